"""Sizes and helpers of the tests that use the real sglang."""

import os
import types

RANKS, RANK, EXPERTS, TOP_K, TOKENS = 8, 3, 64, 6, 200


def prepare(sglang, *modules, experts=EXPERTS):
    import torch

    config = types.SimpleNamespace(hf_config=types.SimpleNamespace(n_routed_experts=experts))
    sglang.setup.prepare_moe_topk(model=torch.nn.ModuleList(modules), model_config=config)


def hash_layer(sglang):
    return sglang.setup.HashTopK(TOP_K, EXPERTS, vocab_size=1000, layer_id=0)


def routed_only(sglang, layer, *inputs, **options):
    """What the same layer gives without Waterfill: the input of the expansion."""
    balancer, layer.waterfill_balancer, layer.enable_waterfill = (
        layer.waterfill_balancer,
        None,
        False,
    )
    try:
        return layer(*inputs, **options)
    finally:
        layer.waterfill_balancer, layer.enable_waterfill = balancer, True


def level_of(routed, tokens):
    """The exact level, by definition: ranks' rows rise until ``tokens`` more are all placed."""
    level = int(routed.max())
    while int((level - routed).clamp(min=0).sum()) < tokens:
        level += 1
    return level


def server_child(arguments):
    """What a process that the server started with these ``ServerArgs`` has of ours."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return what_it_has(arguments)


def what_it_has(arguments):
    from sglang.srt.layers.moe import waterfill

    return {
        "model": arguments.model_path,
        "balancer": waterfill.WaterfillBalancer.__module__,
        "variables": {k: v for k, v in os.environ.items() if k.startswith("WATERFILL")},
    }
