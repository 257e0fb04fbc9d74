"""Real sglang servers with expert parallelism compared: GPU time of forwards, paired, in prefill and in decode.

``python benches/server --help``; what a machine needs is said by ``make server-bench``.
"""
