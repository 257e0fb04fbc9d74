"""``waterfill-rs demo``: live rank processes on real text; no GPU, no sglang."""
