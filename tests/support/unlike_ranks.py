"""One rank of two that prepare a model with the real sglang, of which one cannot or may not serve."""

import logging
import sys
import time
import types

import torch
import torch.distributed as dist

RANKS, EXPERTS, TOP_K = 2, 16, 4


def main(rank, folder, without, limit_s):
    """``without``: makes this rank's check of its machine fail. Prints whose balancer the layer has, and the seconds."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup
    from sglang.srt.runtime_context import get_context, get_model, get_parallel

    from waterfill_rs.sglang import eligibility
    from waterfill_rs.sglang import peers as meeting

    meeting.LONGEST_WAIT_S = limit_s
    if without:
        eligibility.against_machine = lambda: ["no NVRTC here"]
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    get_context().override_server_args(model_path="dummy").install()
    shared = SharedExpertsConfig(use_waterfill=True)
    peers = types.SimpleNamespace(ranks=[0, 1])
    parallel = {"tp_size": RANKS, "tp_rank": rank, "attn_tp_size": RANKS, "attn_tp_rank": rank}
    parallel |= {"moe_ep_size": RANKS, "moe_ep_rank": rank, "moe_ep_group": peers}
    with get_model().override(shared_experts=shared), get_parallel().override(**parallel):
        layer = moe_ep_setup.HashTopK(TOP_K, EXPERTS, vocab_size=1000, layer_id=0)
        config = types.SimpleNamespace(hf_config=types.SimpleNamespace(n_routed_experts=EXPERTS))
        dist.barrier()
        begin = time.monotonic()
        try:
            moe_ep_setup.prepare_moe_topk(model=torch.nn.ModuleList([layer]), model_config=config)
        finally:
            print(type(layer.waterfill_balancer).__module__, time.monotonic() - begin, flush=True)
