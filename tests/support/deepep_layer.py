"""One rank of a MoE layer over real DeepEP, shared experts at home and then by live plans; see test_deepep_layer.py.

``deepep_layer.py RANK RANKS FOLDER``: ranks meet through files in FOLDER. The last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from batches import SHARED_WEIGHT, batch, on_cpu, same
from torch import Tensor

import waterfill_rs
from waterfill_rs import _native
from waterfill_rs.exchange.device import DeviceExchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.torch import count

EXPERTS, TOP_K, HIDDEN, INNER = 64, 6, 1024, 128
WAIT_US = 10_000_000
SHAPES = {
    "even": lambda ranks: [256] * ranks,
    "uneven": lambda ranks: [64 + 448 * (rank % 2) for rank in range(ranks)],
    "one idle": lambda ranks: [300 * (rank > 0) for rank in range(ranks)],
    "decode": lambda ranks: [8 + rank for rank in range(ranks)],
    "one token": lambda ranks: [int(rank == ranks - 1) for rank in range(ranks)],
}
SEEDS = 4


def load_deep_ep():
    # A DeepEP built without NVSHMEM has symbols that one node never calls.
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    import deep_ep

    return deep_ep


class Layer:
    """This rank's experts in its slots, the shared one in the last; every expert also by number, for the reference."""

    def __init__(self, rank: int, ranks: int, buffer) -> None:
        self.rank, self.ranks, self.buffer = rank, ranks, buffer
        self.slots = EXPERTS // ranks + 1
        random = torch.Generator(device="cuda").manual_seed(1)

        def weights(rows: int, columns: int) -> Tensor:
            shape = (EXPERTS + 1, rows, columns)
            return torch.randn(shape, generator=random, device="cuda").div(rows**0.5).bfloat16()

        self.up, self.down = weights(HIDDEN, INNER), weights(INNER, HIDDEN)
        first = rank * (self.slots - 1)
        self.mine = [*range(first, first + self.slots - 1), EXPERTS]

    def expert(self, number: int, rows: Tensor) -> Tensor:
        up, down = self.up[number].to(rows.dtype), self.down[number].to(rows.dtype)
        return torch.nn.functional.silu(rows @ up) @ down

    def output(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, list[int]]:
        """DeepEP's dispatch, the experts in float32, DeepEP's combine; and the rows that each slot received."""
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            ids, self.slots * self.ranks
        )
        rows, local, scale, listed, handle, _ = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        out = torch.zeros((len(rows), HIDDEN), device="cuda")
        received = []
        for slot, number in enumerate(self.mine):
            row, column = (local == slot).nonzero(as_tuple=True)
            received.append(len(row))
            if len(row):
                part = self.expert(number, rows[row].float()) * scale[row, column, None]
                out.index_add_(0, row, part)
        assert received == listed, f"slots hold {received} rows, DeepEP told {listed}"
        combined, _, _ = self.buffer.combine(out.bfloat16(), handle)
        return combined, received

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """In float64 without a dispatch: the output, and the sum of its terms' absolute values."""
        out = torch.zeros((len(x), HIDDEN), dtype=torch.float64, device="cuda")
        size = torch.zeros_like(out)
        token = (ids >= 0).any(1)
        for number in range(EXPERTS + 1):
            hit = ids == number
            share = (weights * hit).double().sum(1) if number < EXPERTS else token * SHARED_WEIGHT
            row = share.nonzero().flatten()
            part = self.expert(number, x[row].double()) * share[row, None]
            out.index_add_(0, row, part)
            size.index_add_(0, row, part.abs())
        return out, size


def check(layer: Layer, exchange: DeviceExchange, shape: str, seed: int) -> dict:
    """One batch of all ranks, at home and by the live plan."""
    rank, ranks = layer.rank, layer.ranks
    rows = SHAPES[shape](ranks)[rank]
    # As a router gives them: an expert at most once a token; and padding, of whole rows and of slots.
    padding, weights = batch(seed * 100 + rank, rows, TOP_K, EXPERTS, ids=torch.int64)
    random = torch.Generator().manual_seed(seed)
    popular = torch.randn(EXPERTS, generator=random).mul(0.6 * (seed % 3)).exp()
    random.manual_seed(seed * 100 + rank)
    order = torch.rand((rows, EXPERTS), generator=random).log().div(popular)
    order = order.argsort(dim=1, descending=True)[:, :TOP_K]
    ids = torch.where(padding >= 0, order, -1).contiguous()
    x = torch.randn((rows, HIDDEN), generator=random).bfloat16().cuda()

    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, count(ids, physical_experts=EXPERTS, ranks=ranks))
    routed = [sum(of) for of in zip(*(counts for counts, _, _ in gathered), strict=True)]
    tokens = [tokens for _, _, tokens in gathered]
    plan = waterfill_rs.plan(
        routed,
        tokens,
        ranks=ranks,
        physical_experts=EXPERTS,
        visits=[visits for _, visits, _ in gathered],
    )
    where = dict(experts=EXPERTS, ranks=ranks, rank=rank)
    home = on_cpu(ids, weights, quotas=[tokens[rank] * (r == rank) for r in range(ranks)], **where)
    live = exchange.expand(ids.cuda(), weights.cuda(), SHARED_WEIGHT)
    assert same(live, on_cpu(ids, weights, quotas=plan.quotas_of(rank), **where)), "not the plan"
    assert torch.equal(live[0][:, :-1].cpu(), home[0][:, :-1]), "routed ids differ from home's"

    at_home, home_rows = layer.output(x, *(tensor.cuda() for tensor in home))
    planned, live_rows = layer.output(x, *live)
    expected = [routed[number] for number in layer.mine[:-1]]
    assert home_rows == [*expected, tokens[rank]], f"home received {home_rows}"
    assert live_rows == [*expected, plan.shared_rows[rank]], f"live received {live_rows}"

    exact, size = layer.reference(x, ids.cuda(), weights.cuda())
    # Each rank's part is rounded to bfloat16 once and their sum once more: 2^-8 of the terms each; float32 before it.
    allowed = size * (2**-7 * 1.02) + 1e-5
    errors = [(out.double() - exact).abs() for out in (at_home, planned)]
    for name, error in zip(("home", "live"), errors, strict=True):
        assert bool((error <= allowed).all()), f"{name}: {float((error - allowed).max())} too far"
    norm = float(exact.norm()) or 1.0
    total: list = [None] * ranks
    dist.all_gather_object(total, (sum(home_rows), sum(live_rows)))
    everything = sum(routed) + sum(tokens)
    assert [sum(of) for of in zip(*total, strict=True)] == [everything] * 2
    mean = everything / ranks
    return {
        "home_error": float((at_home.double() - exact).norm()) / norm,
        "live_error": float((planned.double() - exact).norm()) / norm,
        "apart": float((planned.double() - at_home.double()).norm()) / norm,
        "of_allowed": max((float((e / allowed).max()) for e in errors if e.numel()), default=0.0),
        "moved": tokens[rank] - plan.quotas_of(rank)[rank],
        "home_level": max(at[0] for at in total) / mean,
        "live_level": max(at[1] for at in total) / mean,
    }


def main(rank: int, ranks: int, folder: Path) -> None:
    deep_ep = load_deep_ep()
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    # All ranks' blocks must be on the one GPU at once: they wait for each other.
    deep_ep.Buffer.set_num_sms(20 if ranks <= 4 else 10)
    configs = deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
    room = max(config.get_nvl_buffer_size_hint(HIDDEN * 2, ranks) for config in configs)
    layer = Layer(rank, ranks, deep_ep.Buffer(dist.group.WORLD, room, 0))

    made = [f"waterfill-deepep-{os.getpid()}", secrets.randbits(120)]
    if rank == 0:
        board = _native.Board.create(made[0], ranks, ranks, made[1])
    dist.broadcast_object_list(made)
    if rank > 0:
        board = _native.Board.attach(made[0], ranks, ranks, made[1])
    dist.barrier()
    if rank == 0:
        board.unlink()
    exchange = DeviceExchange(
        torch.device("cuda", 0),
        Member(ranks, EXPERTS, rank),
        reason="the test's",
        board=board,
        plans=rank == 0,
        cap_us=WAIT_US,
        patience_us=WAIT_US,
    )
    checked = []
    for shape in SHAPES:
        for seed in range(SEEDS):
            try:
                checked.append(check(layer, exchange, shape, seed))
            except Exception as error:
                raise RuntimeError(f"rank {rank} of {ranks}, {shape}, seed {seed}") from error
    tally = exchange.tally()
    assert tally["live"] == len(checked) == tally["calls"], tally
    torch.cuda.synchronize()
    dist.barrier()
    exchange.close()
    worst = {name: max(each[name] for each in checked) for name in checked[0]}
    means = {
        f"mean_{name}": sum(each[name] for each in checked) / len(checked)
        for name in ("home_level", "live_level")
    }
    moved = sum(each["moved"] for each in checked)
    print(json.dumps({"calls": len(checked), **worst, **means, "moved": moved}), flush=True)
    os._exit(0)  # DeepEP's and gloo's ends wait for each other in no order that could be relied on.


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
