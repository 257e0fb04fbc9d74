"""What the Grafana dashboard's panels show, drawn from real processes: ``dashboard.py PICTURE``.

Four rank processes exchange for 45 s and push metrics as they do in sglang; one is stopped for 4 s, later one is
killed. The page is read as Prometheus reads it, and each panel's query is computed here, with rates over 5 s.
Not Grafana: neither it nor Prometheus is needed to run this.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time

RANKS, EXPERTS, TOP_K, LAYERS, TOKENS, STEP_S = 4, 64, 6, 3, 64, 0.02
SECONDS, STOPPED, KILLED, RATE_S = 45, (12, 16), 30, 5
STOPPED_RANK, KILLED_RANK = 3, 2
CAP_US = 20_000  # Ranks and reader share cores here.


def rank_process(rank: int, name: str, begin: float) -> None:
    from waterfill_rs import _native
    from waterfill_rs.demo.workload import Router, documents
    from waterfill_rs.exchange.ends import BoardEnd
    from waterfill_rs.exchange.member import Member
    from waterfill_rs.exchange.settings import BoardSettings
    from waterfill_rs.sglang import metrics

    metrics.INTERVAL_S = 0.5
    board = _native.Board.attach(name, RANKS, EXPERTS, 7)
    settings = BoardSettings(CAP_US, "inline")
    reason = "all ranks are on one host and share its /dev/shm"
    end = BoardEnd.open(board, Member(RANKS, EXPERTS, rank), settings, reason)
    page = metrics.Page()
    page.watch(end, leads=rank == 0)
    shared = {"overlapped": 0, "fused": 0}
    page.shared.append(shared)
    steps = int(SECONDS / STEP_S)
    texts, stream = documents([]), []
    for _ in range(rank + 1):  # Each rank has a text of its own.
        stream = next(texts)
    while len(stream) < steps * TOKENS:
        stream = stream + stream
    routers = [Router(EXPERTS, TOP_K, layer) for layer in range(LAYERS)]
    for router in routers:
        router.route(stream)  # The tables are filled before the clock starts.
    for step in range(steps):
        time.sleep(max(0.0, begin + step * STEP_S - time.time()))
        for router in routers:
            ids = router.route(stream[step * TOKENS : (step + 1) * TOKENS])
            end.expand_array(ids, TOP_K)
            shared["fused"] += 1
        page.push({"model_name": "demo", "moe_ep_rank": rank})


def read(folder: str) -> dict[tuple[str, ...], float]:
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)
    found: dict[tuple[str, ...], float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "moe_ep_rank")}
            key = (sample.name.removeprefix("sglang:waterfill_"), *own.values())
            if key == ("live_ratio",):  # the dashboard's minimum over ranks
                found[key] = min(found.get(key, 1), sample.value)
            else:  # its sum
                found[key] = found.get(key, 0) + sample.value
    return found


def watch(folder: str, processes: list[multiprocessing.Process], begin: float) -> list:
    """A page every half second; the signals between."""
    moments = [
        (STOPPED[0], STOPPED_RANK, signal.SIGSTOP),
        (STOPPED[1], STOPPED_RANK, signal.SIGCONT),
        (KILLED, KILLED_RANK, signal.SIGKILL),
    ]
    pages = []
    for tick in range(2 * SECONDS):
        time.sleep(max(0.0, begin + tick / 2 - time.time()))
        while moments and moments[0][0] <= tick / 2:
            _, rank, what = moments.pop(0)
            os.kill(processes[rank].pid, what)
            processes[rank].join(0.01)  # One that was killed is no zombie.
        pages.append((tick / 2, read(folder)))
    return pages


def rates(pages: list, key: tuple[str, ...]) -> list[tuple[float, float]]:
    back = 2 * RATE_S
    return [
        (now, (page.get(key, 0) - before.get(key, 0)) / RATE_S)
        for (_, before), (now, page) in zip(pages, pages[back:], strict=False)
    ]


def quantile(pages: list, part: float) -> list[tuple[float, float]]:
    limits = sorted({float(key[1]) for key in pages[-1][1] if key[0] == "exchange_seconds_bucket"})
    names = {float(key[1]): key for key in pages[-1][1] if key[0] == "exchange_seconds_bucket"}
    grown = [rates(pages, names[limit]) for limit in limits]
    found = []
    for at_limits in zip(*grown, strict=True):
        total = at_limits[-1][1]
        inside = (i for i, (_, count) in enumerate(at_limits) if total and count >= part * total)
        if (i := next(inside, None)) is not None:
            below = at_limits[i - 1][1] if i else 0.0
            low = limits[i - 1] if i else 0.0
            share = (part * total - below) / max(at_limits[i][1] - below, 1e-9)
            found.append((at_limits[0][0], low + (min(limits[i], 10) - low) * share))
    return found


def draw(pages: list, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(13, 12), constrained_layout=True)
    (info,) = (key for key in pages[-1][1] if key[0] == "info")
    figure.suptitle(f"waterfill_info: {', '.join(info[1:])}", fontsize=11)
    panels = axes.flat

    def panel(title: str, lines: dict[str, list[tuple[float, float]]], unit: str) -> None:
        axis = next(panels)
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="seconds", ylabel=unit, xlim=(0, SECONDS))
        axis.axvspan(*STOPPED, color="orange", alpha=0.15, label=f"rank {STOPPED_RANK} stopped")
        axis.axvline(KILLED, color="red", linestyle=":", label=f"rank {KILLED_RANK} killed")
        axis.legend(fontsize=8)

    ends = ("live", "none", "timed_out", "broken")
    results = {name: rates(pages, ("exchange_total", name)) for name in ends}
    panel("Exchanges a second, by result", results, "1/s")
    waits = {f"p{round(100 * q)}": quantile(pages, q) for q in (0.5, 0.99)}
    panel("Wait for the plan", waits, "s")
    pyplot.sca(axes.flat[1])
    pyplot.yscale("log")
    ratio = {
        name: [(at, page[key]) for at, page in pages if (key := ("imbalance_ratio", name)) in page]
        for name in ("home", "planned")
    }
    panel("Slowest rank over the mean", ratio, "ratio")
    missed = {f"rank {rank}": rates(pages, ("missed_total", str(rank))) for rank in range(RANKS)}
    panel("Exchanges that missed a rank, a second", missed, "1/s")
    share = {"live": [(at, page[key]) for at, page in pages if (key := ("live_ratio",)) in page]}
    panel("Share of live exchanges", share, "ratio")
    reasons = {name: rates(pages, ("none_total", name)) for name in ("late", "silent", "given_up")}
    panel("Exchanges without a plan, a second", reasons, "1/s")
    alive = {
        f"rank {rank}": [
            (at, page[key] + 0.02 * rank)
            for at, page in pages
            if (key := ("peer_alive", str(rank))) in page
        ]
        for rank in range(RANKS)
    }
    panel("Ranks alive (lines set apart)", alive, "1 or 0")
    places = {name: rates(pages, ("shared_total", name)) for name in ("overlapped", "fused")}
    panel("Where shared experts ran, eager calls a second", places, "1/s")
    figure.savefig(file, dpi=70)


def main() -> None:
    from waterfill_rs import _native

    context = multiprocessing.get_context("spawn")
    name = f"waterfill-rs-{os.getpid()}-da5b0a4d"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        board = _native.Board.create(name, RANKS, EXPERTS, 7)
        begin = time.time() + 8
        processes = [
            context.Process(target=rank_process, args=(rank, name, begin), daemon=True)
            for rank in range(RANKS)
        ]
        try:
            for process in processes:
                process.start()
            pages = watch(folder, processes, begin)
        finally:
            board.unlink()
            for process in processes:
                process.kill()
        draw(pages, sys.argv[1])


if __name__ == "__main__":
    main()
