"""What operators run on a host: ``waterfill-rs doctor``, ``status`` and ``top``."""
