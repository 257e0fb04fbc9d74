"""The real sglang in this process, entered through the package's entry point."""

import os
import types

import pytest
from inside import RANK, RANKS


@pytest.fixture(scope="session")
def sglang():
    """sglang with plugins loaded, as its launcher and scheduler do, and a model's context published.

    ``original``, ``own_balancer``, ``sglangs``: the hash router, the balancer and the recorder's names from before.
    """
    os.environ["SGLANG_OPT_USE_FUSED_HASH_TOPK"] = "0"
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.eplb import expert_distribution
    from sglang.srt.layers.moe import hash_topk, topk, waterfill
    from sglang.srt.plugins import load_plugins

    original, own_balancer = hash_topk.HashTopK, waterfill.WaterfillBalancer
    sglangs = dict(vars(expert_distribution))
    load_plugins()
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup
    from sglang.srt.runtime_context import get_context, get_exec, get_model, get_parallel

    get_context().override_server_args(model_path="dummy").install()
    shared = SharedExpertsConfig(use_waterfill=True)
    parallel = dict(
        tp_size=RANKS,
        tp_rank=RANK,
        attn_tp_size=RANKS,
        attn_tp_rank=RANK,
        moe_ep_size=RANKS,
        moe_ep_rank=RANK,
    )
    with get_model().override(shared_experts=shared), get_parallel().override(**parallel):
        yield types.SimpleNamespace(
            hash_topk=hash_topk,
            topk=topk,
            waterfill=waterfill,
            setup=moe_ep_setup,
            original=original,
            own_balancer=own_balancer,
            recording=expert_distribution,
            sglangs=sglangs,
            moe=get_exec().moe,
        )
