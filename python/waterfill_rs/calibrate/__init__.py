"""``waterfill-rs calibrate``: measures what this machine's GPUs take, for cost models and the prefill rule."""
