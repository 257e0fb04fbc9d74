"""One rank of two that prepare a model with the real sglang and run layers."""

import json
import os
import types
from pathlib import Path

import torch
import torch.distributed as dist

RANKS, EXPERTS, TOP_K, LAYERS, CALLS = 2, 16, 4, 3, 20


def main(rank, folder):
    os.environ["SGLANG_OPT_USE_FUSED_HASH_TOPK"] = "0"
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup
    from sglang.srt.runtime_context import get_context, get_model, get_parallel

    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    get_context().override_server_args(model_path="dummy").install()
    shared = SharedExpertsConfig(use_waterfill=True)
    group = types.SimpleNamespace(ranks=[0, 1])
    parallel = {"tp_size": RANKS, "tp_rank": rank, "attn_tp_size": RANKS, "attn_tp_rank": rank}
    parallel |= {"moe_ep_size": RANKS, "moe_ep_rank": rank, "moe_ep_group": group}
    with get_model().override(shared_experts=shared), get_parallel().override(**parallel):
        layers = [
            moe_ep_setup.HashTopK(TOP_K, EXPERTS, vocab_size=1000, layer_id=0)
            for _ in range(LAYERS)
        ]
        config = types.SimpleNamespace(hf_config=types.SimpleNamespace(n_routed_experts=EXPERTS))
        moe_ep_setup.prepare_moe_topk(model=torch.nn.ModuleList(layers), model_config=config)
        end = layers[0].waterfill_balancer.exchange
        assert all(layer.waterfill_balancer.exchange is end for layer in layers)
        received = [expand(layers[i % LAYERS], rank, i) for i in range(CALLS)]
        found = {"name": end.name, "tally": end.tally(), "received": received}
        end.close()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def expand(layer, rank, call):
    """Rows for each rank, routed and shared; rank 1 is idle in every fifth call."""
    torch.manual_seed(100 * call + rank)
    rows = 0 if rank == 1 and call % 5 == 0 else 30 + 10 * rank
    if rows == 0:
        expanded = layer.empty_topk_output(torch.device("cpu"))
    else:
        inputs = torch.zeros(rows, 8), torch.randn(rows, EXPERTS), torch.randint(0, 20, (rows,))
        expanded = layer(*inputs)
    ids = expanded.topk_ids
    assert ids.shape == (rows, TOP_K + 1)
    slots = EXPERTS // RANKS + 1
    routed = torch.bincount(ids[:, :-1].flatten() // slots, minlength=RANKS).tolist()
    shared = torch.bincount(ids[:, -1] // slots, minlength=RANKS).tolist()
    return {"tokens": rows, "routed": routed, "shared": shared}
