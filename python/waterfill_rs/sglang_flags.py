"""Which values of sglang's flags leave experts where sglang puts them: for the wiring, and for the doctor, which has a command.

``value`` gives what a flag was given, by the name that ``ServerArgs`` has for it: None where it was left out, and True or ``""``
for one that takes no value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "against_backend",
    "against_format",
    "against_order",
    "against_spread",
    "against_unmapped",
]

Value = Callable[[str], Any]

_DISPATCHES = ("static", "dynamic", "lp")
"""Of ``--ep-dispatch-algorithm``: those that take the replicas of the map."""
_BY_LOGICAL_EXPERT = (
    "auto",
    "pt",
    "safetensors",
    "npcache",
    "dummy",
    "gguf",
    "bitsandbytes",
    "mistral",
    "layered",
    "flash_rl",
    "fastsafetensors",
    "runai_streamer",
    "instanttensor",
)
"""``--load-format`` of weights that sglang puts where the map says. Others bring a rank's slots as somebody wrote them."""
_SEED = "remote_instance_weight_loader_start_seed_via_transfer_engine"
_KTRANSFORMERS = ("kt_weight_path", "kt_num_gpu_experts", "kt_cpuinfer")
_FORMATS = (None, "fp8")
"""Of weights. Others load some scales by trivial places (ModelOpt's FP4), or did (``moe_wna16``)."""
_UNMAPPED = "megamoe"
"""Of the backends that Waterfill takes, the one beside DeepEP."""


def against_order(value: Value) -> list[str]:
    """Why the experts of a rank stay in sglang's order."""
    if backend := value("elastic_ep_backend"):
        return [f"--elastic-ep-backend {backend}"]
    if (found := value("load_format") or "auto") not in _BY_LOGICAL_EXPERT:
        return [f"--load-format {found} brings weights in an order of its own"]
    if (value("weight_cache_mode") or "off") != "off":
        return ["another process loads the weights (--weight-cache-mode)"]
    if _is_given(value(_SEED)):
        return [f"other servers read this one's slots (--{_SEED.replace('_', '-')})"]
    return []


def against_spread(value: Value) -> list[str]:
    """Why experts without a placement stay in trivial places, where their order need not stay."""
    if algorithm := value("speculative_algorithm"):
        return [
            f"--speculative-algorithm {algorithm}: draft layers load weights by this map, and take logical ids for physical ones"
        ]
    if _is_given(value("enable_lora")) or value("lora_paths"):
        return ["--enable-lora: adapters of experts are found by physical ids"]
    for name in _KTRANSFORMERS:
        if value(name) is not None:
            return [f"--{name.replace('_', '-')}: KTransformers counts experts in trivial places"]
    if value("moe_a2a_backend") == _UNMAPPED:
        return against_backend(_UNMAPPED)
    return against_format(value("quantization"))


def against_backend(found: str) -> list[str]:
    """Until 0.5.22 layers map ids on DeepEP's path, and elsewhere only with ``--enable-eplb``. ``found``: in force."""
    if found == "deepep":
        return []
    return [
        f"--moe-a2a-backend {found}: sglang takes logical ids for physical ones on some of its paths, but not on deepep's"
    ]


def against_format(quantization: str | None) -> list[str]:
    """Of the model's weights."""
    if quantization in _FORMATS:
        return []
    return [
        f"weights quantized as {quantization} may load scales by trivial places: fp8 and unquantized ones do not"
    ]


def against_unmapped(algorithm: str | None) -> list[str]:
    """With any other map than the trivial one, a sglang that maps no ids runs wrong experts. ``algorithm``: in force."""
    if algorithm in _DISPATCHES:
        return []
    if algorithm is None:
        return [
            "without --ep-dispatch-algorithm sglang takes logical ids for physical ones: give --ep-dispatch-algorithm static"
        ]
    return [f"--ep-dispatch-algorithm {algorithm} is none of {', '.join(_DISPATCHES)}"]


def _is_given(value: Any) -> bool:
    """A flag without a value."""
    return value not in (None, False)
