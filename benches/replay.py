"""Seconds and memory of ``waterfill-rs replay``, alone and beside busy cores: ``replay.py [BUSY...]`` (default: 0 1).

Two recordings of random routing: tokens of 32 ranks (1,024 each, 58 layers, 4 passes, 256 experts, top 8), and a ring of
1,000 steps of counts (58 layers, 256 experts) at EP 32. BUSY is how many processes do nothing but compute beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

RANKS, TOKENS, LAYERS, PASSES, EXPERTS, TOP_K, STEPS = 32, 1024, 58, 4, 256, 8, 1000

REPLAY = [sys.executable, "-m", "waterfill_rs.cli", "replay"]


def main() -> None:
    torch.set_num_threads(1)
    numbers = [int(number) for number in sys.argv[1:]] or [0, 1]
    print(f"{'recording':<20}{'busy beside':>12}{'seconds':>10}{'of CPU':>10}{'MiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        ring = Path(folder, "ring.pt")
        torch.save({"rank": 0, "logical_count": ring_of_counts()}, ring)
        tokens = Path(folder, "tokens")
        tokens.mkdir()
        for rank in range(RANKS):
            torch.save(recorded(rank), tokens / f"expert_distribution_recorder_0.0_{rank}.pt")
        for busy in numbers:
            counts = [ring, "--ep", RANKS, "--top-k", TOP_K]
            for name, arguments in (("ring of counts", counts), ("tokens", [tokens])):
                with computing(busy):
                    seconds, cpu, memory = measured(arguments)
                print(f"{name:<20}{busy:>12}{seconds:>10.1f}{cpu:>10.1f}{memory:>8.0f}", flush=True)


def routing(rows: int, seed: int) -> torch.Tensor:
    """Ids of tokens, ``[rows, top_k]`` int32, some experts hotter than others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, EXPERTS, generator=generator) + torch.linspace(0, 0.2, EXPERTS)
    return scores.topk(TOP_K).indices.int()


def recorded(rank: int) -> dict[str, object]:
    """One rank's file of mode per_token."""
    ids = torch.stack([routing(TOKENS, rank * LAYERS + layer) for layer in range(LAYERS)])
    records = [
        {
            "forward_pass_id": number,
            "rank": rank,
            "forward_mode": 1,
            "topk_ids_of_layer": (ids + 31 * number) % EXPERTS,
        }
        for number in range(PASSES)
    ]
    mapping = torch.arange(EXPERTS).repeat(LAYERS, 1)
    return {"records": records, "last_physical_to_logical_map": mapping}


def ring_of_counts() -> torch.Tensor:
    """``[steps, L, E]`` int32, 4,096 tokens a step."""
    weights = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(0)) + 0.2
    share = weights / weights.sum(1, keepdim=True)
    noise = 0.5 + torch.rand(STEPS, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1))
    counts = (share * noise * 4096 * TOP_K).int()
    counts[:, :, 0] += (TOP_K - counts.sum(2) % TOP_K).int()
    return counts


def measured(arguments: list[object]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak MiB of a replay, start and imports included."""
    begun = time.monotonic()
    command = [*REPLAY, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@contextmanager
def computing(processes: int) -> Iterator[None]:
    """So many processes that compute."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
