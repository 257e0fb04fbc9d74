"""How ranks learn each other's counts: a board in a node's shared memory, a collective of CUDA devices, or not at all.

``rendezvous`` opens a rank's end, an ``interface.Exchange``. ``host`` has those of layers on the CPU, over ``ends``;
``device`` those of CUDA devices.
"""
