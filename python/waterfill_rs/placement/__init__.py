"""Where a layer's experts stand: a map ``[P]`` from physical to logical experts, without torch and without sglang."""
