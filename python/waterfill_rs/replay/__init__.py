"""``waterfill-rs replay``: reads what sglang recorded, places experts anew, and shows what each policy makes of it."""
