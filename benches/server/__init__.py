"""Real sglang servers with expert parallelism compared: GPU time of forwards, paired, in prefill and in decode, and tokens
per second of mixed traffic.

``python benches/server --help``; what a machine needs is said by ``make server-bench``. What runs where:

- The driver: ``cli`` reads options, ``phases`` makes phases of them, ``bench`` has their engines started (``engines``,
  ``processes``, ``workspace``, ``model``) and measures them (``sweeps``: full forwards; ``mixed``: traffic;
  ``outputs``: answers; ``layer_outputs``: outputs of layers). What was found becomes ``figures``, ``mixed_figures``, ``output_figures``, ``memory`` and ``accounts``,
  is written by ``results`` and shown by ``table``.
- An engine's process: ``engine`` runs rounds, ``traffic`` sends requests over time, ``answers`` asks for what is compared.
- Its ranks: ``plugin`` hooks sglang, ``gate`` holds requests back, ``forced`` gives the routing, ``rank`` keeps what comes
  of it, ``layers`` gives the layers inputs, ``switch`` and ``choice`` set a forward's mode.
"""
