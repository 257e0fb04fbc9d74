"""One rank of two that run layers of the real sglang with redundant experts, before and after a rebalance.

Of every three calls one is a prefill whose shared experts are routed, one a prefill with them beside dispatch, and one a
decode, with them beside dispatch. The MoE layers around the routers are stand-ins: see ``Moe``.
"""

import json
import logging
import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist

RANKS, LOGICAL, REDUNDANT, TOP_K, LAYERS, CALLS = 2, 16, 4, 4, 3, 9
PHYSICAL = LOGICAL + REDUNDANT
SLOTS = PHYSICAL // RANKS + 1
"""Of a rank, the shared expert's with them."""
FUSED, BESIDE, DECODE = KINDS = ("fused prefill", "prefill beside dispatch", "decode")


def kind_of(call):
    """Each layer has each kind once, one before the rebalance of layer 1, one before that of the others."""
    return KINDS[(call + call // LAYERS) % len(KINDS)]


def maps_of(seed, first=False):
    """``[layers, P]``; each logical expert has a physical one or more. ``first``: each rank's first ones are all, once."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(LOGICAL, (LAYERS, REDUNDANT), generator=generator)
    if first:
        once = torch.stack([torch.randperm(LOGICAL, generator=generator) for _ in range(LAYERS)])
        parts = once.view(LAYERS, RANKS, -1), more.view(LAYERS, RANKS, -1)
        return torch.cat(parts, dim=2).view(LAYERS, PHYSICAL)
    experts = torch.cat([torch.arange(LOGICAL).repeat(LAYERS, 1), more], dim=1)
    shuffled = [row[torch.randperm(PHYSICAL, generator=generator)] for row in experts]
    return torch.stack(shuffled)


def metadata(physical_to_logical, rank):
    """sglang's own, of such a map."""
    from sglang.srt.eplb import expert_location

    of_logical = [
        [(row == expert).nonzero().flatten().tolist() for expert in range(LOGICAL)]
        for row in physical_to_logical
    ]
    return expert_location.ExpertLocationMetadata._init_raw(
        RANKS,
        physical_to_logical.clone(),
        torch.tensor(expert_location._pad_nested_array(of_logical, pad_value=-1)),
        moe_ep_rank=rank,
    )


class Moe:
    """As sglang's MoE layer calls its router; and the slots of a rank that grouped GEMMs have meanwhile."""

    num_fused_shared_experts = 1
    experts = types.SimpleNamespace(num_local_experts=SLOTS)

    def __init__(self, router):
        self._router, self.used = router, []

    def forward(self, inputs, batch):
        from waterfill_rs.sglang.routed_groups import slots

        self.used.append(slots.used)
        if not len(inputs[0]):
            return self._router.empty_topk_output(torch.device("cpu"))
        router = self._router
        return getattr(router, "forward_native", router)(*inputs)

    op_select_experts = op_shared_experts = forward


def run_beside_dispatch():
    """Have ``Moe`` around each router, with the package's own choice by batch: prefills as ``prefills`` says."""
    from waterfill_rs.sglang import overlap, unfusing

    def decide(share, model, routers, *_):
        prefills = types.SimpleNamespace(overlap=False)
        choice = overlap.Choice(share._seams, RANKS, RANKS, lambda tokens: prefills.overlap)
        unfused = types.SimpleNamespace(follow=lambda: None, mlp=None)
        for router in routers:
            router.moe, router.prefills = Moe(router), prefills
            router.moe.__dict__["num_fused_shared_experts"] = 1
            router.waterfill_balancer.overlap = overlap.OverlappedLayer(router.moe, unfused, choice)
        return "beside dispatch"

    unfusing.Share.decide = decide


def within_ranks(maps, seed):
    """The same experts on each rank, in another order."""
    generator = torch.Generator().manual_seed(seed)
    of_ranks = maps.view(LAYERS, RANKS, -1).clone()
    for one in of_ranks.flatten(0, 1):
        one.copy_(one[torch.randperm(len(one), generator=generator)])
    return of_ranks.view(LAYERS, PHYSICAL)


def unfit():
    """``[layers, P]`` whose first rank has more experts that are nowhere else than half of all."""
    here = PHYSICAL // RANKS
    others = list(range(here, LOGICAL))
    row = [*range(here), *others, *others[: here - len(others)]]
    return within_ranks(torch.tensor(row).repeat(LAYERS, 1), 5)


def give(**flags):
    """As if the operator had given the flags, at the place where we read them."""
    from sglang.srt import runtime_context

    given = runtime_context.get_server_args()
    fields = {**flags, "__getattr__": lambda _, name: getattr(given, name)}
    there = type("Given", (), fields)()
    runtime_context.get_server_args = lambda: there


def main(rank, folder, algorithm, maps):
    """``algorithm``: sglang's. Writes what its calls gave to ``RANK.json``.

    ``maps``: ``alike``; ``differs``, rank 1 has another one; ``first``, primary replicas are the first; ``moves``, they are and
    the server may move experts; ``eplb``, it may, and knows that Waterfill is on. There they can be the first, but in the
    maps that layers 0 and 2 are to have later. ``disagrees``: as ``eplb``, and rank 1 is to leave replicas to sglang.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if maps == "disagrees" and rank == 1:
        os.environ["WATERFILL_RS_REPLICAS"] = "sglang"
    os.environ["SGLANG_OPT_USE_FUSED_HASH_TOPK"] = "0"
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import get_context, get_exec, get_model, get_parallel

    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    get_context().override_server_args(model_path="dummy").install()
    if maps in ("moves", "eplb", "disagrees"):
        give(enable_eplb=True, enable_waterfill=maps != "moves")
    shared = SharedExpertsConfig(use_waterfill=True)
    group = types.SimpleNamespace(ranks=[0, 1])
    parallel = {"tp_size": RANKS, "tp_rank": rank, "attn_tp_size": RANKS, "attn_tp_rank": rank}
    parallel |= {"moe_ep_size": RANKS, "moe_ep_rank": rank, "moe_ep_group": group, "ep_size": RANKS}
    parallel |= {"tp_group": group}
    placed = {"ep_num_redundant_experts": REDUNDANT, "moe_a2a_backend": "deepep"}
    placed |= {"ep_dispatch_algorithm": algorithm}
    with (
        get_model().override(shared_experts=shared),
        get_parallel().override(**parallel),
        get_exec().moe.override(**placed),
    ):
        found = _run(rank, algorithm, maps)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def _run(rank, algorithm, maps):
    from sglang.srt.eplb import expert_location

    stand_in_for_lp()
    run_beside_dispatch()
    first = maps in ("first", "moves")
    before, after = maps_of(2 if maps == "differs" and rank else 1, first), maps_of(3)
    if maps in ("eplb", "disagrees"):
        before, after = within_ranks(maps_of(1, True), 4), unfit()
        after[1] = within_ranks(maps_of(3, True), 4)[1]
    there = metadata(before, rank)
    found = {"given": before.tolist(), "started": there.physical_to_logical_map.tolist()}
    expert_location.set_global_expert_location_metadata(there)
    hashed = LAYERS if algorithm == "lp" else 1
    layers, draft = _layers(hashed), _layers(1)[:1]
    _prepare(layers)
    _prepare(draft, is_draft_model=True)
    end = layers[0].waterfill_balancer.exchange
    found |= {"live": end.replicas is not None, "calls": [], "refused": None}
    found["draft"] = draft[0].waterfill_balancer.exchange.replicas is not None
    try:
        for call in range(CALLS):
            if call == CALLS // 3:
                there.update(metadata(after, rank), update_layer_ids=[1])
            if call == 2 * CALLS // 3:
                there.update(metadata(after, rank), [0, 2])
            layer = call % LAYERS
            mapping = there.physical_to_logical_map[layer]
            found["calls"].append(_call(layers[layer], rank, call, mapping))
    except RuntimeError as error:
        found["refused"] = str(error)
    found["maps"] = there.physical_to_logical_map.tolist()
    ids = torch.arange(TOP_K, dtype=torch.int32)[None]
    given = _topk_output(ids, torch.ones(ids.shape))
    drafted = draft[0].waterfill_balancer.expand_topk(given, 1).topk_ids[0, :-1]
    found["drafted"] = (drafted - drafted // SLOTS).tolist()
    found["tally"] = dict(end.tally())
    end.close()
    return found


def stand_in_for_lp():
    """The solver and the choice of ``lp`` are CUDA's: here each row goes to its expert's last replica."""
    from sglang.srt.eplb import expert_location_dispatch, lplb_solver

    def last(ids, info, _):
        number = info.partial_logical_to_all_physical_map_num_valid[ids.long()]
        return info.partial_logical_to_all_physical_map[ids.long(), number - 1].to(ids.dtype)

    expert_location_dispatch._topk_ids_logical_to_physical_probability = last
    for layer in range(LAYERS):
        solver = types.SimpleNamespace(solve=lambda ids: torch.ones(1))
        lplb_solver.set_global_lplb_solver(layer, solver)


def _layers(hashed):
    """So many hash layers of V4, then those of V3. Those have ``lp`` on CUDA devices alone."""
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    of_v4 = [
        moe_ep_setup.HashTopK(TOP_K, LOGICAL, vocab_size=1000, layer_id=layer)
        for layer in range(hashed)
    ]
    return of_v4 + [TopK(TOP_K, layer_id=layer) for layer in range(hashed, LAYERS)]


def _prepare(layers, **configuration):
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    hf_config = types.SimpleNamespace(n_routed_experts=LOGICAL)
    config = types.SimpleNamespace(hf_config=hf_config, **configuration)
    moe_ep_setup.prepare_moe_topk(model=torch.nn.ModuleList(layers), model_config=config)


def _topk_output(ids, weights):
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    return StandardTopKOutput(weights, ids, None)


def _call(layer, rank, call, mapping):
    """One call, in which rank 1 is idle now and then: counts by logical and by physical expert."""
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.runtime_context import get_exec

    kind = kind_of(call)
    set_is_extend_in_batch(kind != DECODE)
    layer.prefills.overlap = kind == BESIDE
    rows = 0 if rank == 1 and call % 4 == 0 else 200 + 70 * rank
    torch.manual_seed(100 * call + rank)
    inputs = torch.zeros(rows, 8), torch.randn(rows, LOGICAL) + torch.linspace(0, 3, LOGICAL)
    if hashes := not hasattr(layer, "forward_native"):
        inputs += (torch.randint(0, 9, (rows,)),)
    forward = layer if hashes else layer.forward_native
    balancer, moe = layer.waterfill_balancer, layer.moe
    chosen = moe.forward(inputs, types.SimpleNamespace())
    ids = chosen.topk_ids[:, :-1] if kind == FUSED else chosen.topk_ids
    assert ids.shape == (rows, TOP_K)
    ids = (ids - ids // SLOTS).long()
    layer.waterfill_balancer, layer.enable_waterfill = None, False
    sglangs = forward(*inputs).topk_ids.long() if rows else ids
    with get_exec().moe.override(ep_dispatch_algorithm=None):
        logical = forward(*inputs).topk_ids.long() if rows else ids
    layer.waterfill_balancer, layer.enable_waterfill = balancer, True
    assert torch.equal(mapping[ids], logical) and torch.equal(mapping[sglangs], logical)
    counted = {
        name: torch.bincount(of.flatten(), minlength=PHYSICAL)
        for name, of in (("ours", ids), ("sglangs", sglangs))
    }
    return {
        "kind": kind,
        "tokens": rows if kind == FUSED else 0,
        "used": moe.used[-1],
        "logical": {name: _logical(counts, mapping) for name, counts in counted.items()},
        **{name: counts.tolist() for name, counts in counted.items()},
        "map": mapping.tolist(),
    }


def _logical(counts, mapping):
    """As sglang's recorder makes logical counts of physical ones, for EPLB and its dumps."""
    from sglang.srt.eplb import expert_distribution

    convert = expert_distribution._convert_global_physical_count_to_logical_count
    return convert(counts[None, None], 1, LOGICAL, mapping[None])[0, 0].tolist()
