"""One rank of several, each on a GPU of its own, joined by NCCL: ``RANK RANKS FOLDER``."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from batches import SHARED_WEIGHT, batch, on_cpu, planned, same

from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.settings import BoardSettings

EXPERTS, TOP_K = 48, 6
ROWS = (0, 1, 8, 128, 1024, 4096)
REPLAYS = 60


class Rank:
    """This process's end; every rank runs the same steps, and knows what the others are given."""

    def __init__(self, rank: int, ranks: int, folder: str) -> None:
        self.rank, self.ranks = rank, ranks
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group("nccl", store=self.store, rank=rank, world_size=ranks)

    def open(self, name: str, cap_us: int):
        return open_exchange(
            dist.PrefixStore(name, self.store),
            Member(self.ranks, EXPERTS, self.rank),
            choice="group",
            settings=BoardSettings(cap_us=cap_us, pace="spin"),
            group=dist.group.WORLD,
            device=self.device,
        )

    def batches(self, seed: int, rows):
        return [batch(seed * 100 + r, rows[r], TOP_K, EXPERTS) for r in range(self.ranks)]

    def expand(self, exchange, ids, weights):
        return exchange.expand(ids.to(self.device), weights.to(self.device), SHARED_WEIGHT)

    def expected(self, made, *, live: bool = True):
        quotas = planned(made, EXPERTS)[self.rank] if live else None
        where = dict(experts=EXPERTS, ranks=self.ranks, rank=self.rank)
        return on_cpu(*made[self.rank], **where, quotas=quotas)

    def is_live(self, exchange, seed: int, rows) -> bool:
        """One call; whether its result is the plan's of all counts. Own counts must give it otherwise."""
        made = self.batches(seed, rows)
        out = self.expand(exchange, *made[self.rank])
        live = same(out, self.expected(made))
        assert live or same(out, self.expected(made, live=False)), f"seed {seed}"
        return live


def eager(me: Rank) -> None:
    exchange = me.open("eager", cap_us=1_000_000)
    calls = 0
    for seed in range(4 * len(ROWS)):
        # All have the same number of rows, then all another one, some of them none.
        apart = seed // len(ROWS)
        rows = [ROWS[(seed + apart * r) % len(ROWS)] for r in range(me.ranks)]
        made = me.batches(seed, rows)
        out = me.expand(exchange, *made[me.rank])
        assert same(out, me.expected(made)), f"seed {seed}, rows {rows}"
        calls += 1
    tally = exchange.tally()
    assert tally["live"] == tally["calls"] == calls, tally
    exchange.close()


def captured(me: Rank) -> None:
    exchange = me.open("captured", cap_us=1_000_000)
    made = me.batches(1, [8] * me.ranks)
    me.expand(exchange, *made[me.rank])
    for i, most in enumerate(ROWS):
        rows = [most if (r + i) % 3 else most // 2 for r in range(me.ranks)]
        ids = torch.zeros((rows[me.rank], TOP_K), dtype=torch.int32, device=me.device)
        weights = torch.zeros((rows[me.rank], TOP_K), device=me.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = exchange.expand(ids, weights, SHARED_WEIGHT)
        for seed in range(REPLAYS):
            made = me.batches(1000 * i + seed, rows)
            ids.copy_(made[me.rank][0])
            weights.copy_(made[me.rank][1])
            graph.replay()
            assert same(out, me.expected(made)), f"rows {rows}, seed {seed}"
    assert exchange.tally()["live"] == 1 + len(ROWS) * REPLAYS, exchange.tally()
    exchange.close()


def without_a_planner(me: Rank) -> None:
    """Rank 0's is stopped: it alone has own counts, and comes back with a new one."""
    exchange = me.open("stopped", cap_us=5_000)
    rows = [100 + 10 * r for r in range(me.ranks)]
    warm = [me.is_live(exchange, seed, rows) for seed in range(5)]
    assert any(warm), warm
    if me.rank == 0:
        exchange._planner.stop()
    before = exchange.tally()
    begun = time.perf_counter()
    for seed in range(20):
        me.is_live(exchange, seed, rows)
    seconds = time.perf_counter() - begun
    after = exchange.tally()
    grown = {name: after[name] - before[name] for name in ("live", "timed_out", "broken")}
    dist.barrier()
    if me.rank == 0:
        assert grown["timed_out"] == 2 and grown["broken"] == 18, grown
        print(
            f"20 calls without a planner, the cap at 5 ms: {seconds * 1e3:.1f} ms with their checks"
        )
        exchange._planner = _native.PlannerThread(
            exchange.board, CostModel.rows(), patience_us=10_000, pace="spin"
        )
    else:
        assert grown["live"] >= 19, grown
    back = [me.is_live(exchange, seed, rows) for seed in range(50)]
    assert all(back[-10:]), back
    exchange.close()


def refused(me: Rank) -> None:
    """The last rank's tensors do not fit: it joins, raises, and the next call is live again."""
    exchange = me.open("refused", cap_us=5_000)
    rows = [50] * me.ranks
    me.is_live(exchange, 1, rows)
    if me.rank == me.ranks - 1:
        ids, weights = me.batches(2, rows)[me.rank]
        try:
            me.expand(exchange, ids[:, :-1].contiguous(), weights)
        except ValueError as error:
            assert "topk_ids has shape" in str(error)
        else:
            raise AssertionError("ids of another shape were taken")
    else:
        me.is_live(exchange, 2, rows)
        assert exchange.tally()["none"] >= 1, exchange.tally()
    assert any([me.is_live(exchange, seed, rows) for seed in range(3, 6)])
    exchange.close()


def main(rank: int, ranks: int, folder: str) -> None:
    me = Rank(rank, ranks, folder)
    for check in (eager, captured, without_a_planner, refused):
        begun = time.perf_counter()
        check(me)
        print(f"rank {rank}: {check.__name__} in {time.perf_counter() - begun:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
