"""Not a test: one rank of two on "hosts" of their own, which exchange counts at a model's pace: ``RANK LOST_S FOLDER``."""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from waterfill_rs.exchange import rendezvous
from waterfill_rs.exchange.link import Limits
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.torch import count

EXPERTS, TOP_K, PACE_S, WAIT_S = 24, 3, 0.02, 0.2


def main(rank, lost, folder):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    # They are on one machine, which their boot ids would tell.
    rendezvous._boot = lambda: f"host {rank}"
    store = dist.TCPStore("10.231.7.1", 29511, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    exchange = open_exchange(
        dist.PrefixStore("waterfill", store),
        ranks=2,
        rank=rank,
        experts=EXPERTS,
        group=dist.group.WORLD,
        limits=Limits(wait=WAIT_S, lost=lost),
    )
    assert exchange.name == "group" and "host (boot id)" in exchange.reason
    longest, refused = 0.0, 0
    while not all((folder / f"{each}.stopped").exists() for each in range(2)):
        if (folder / "stop").exists():
            logging.disable()  # From here on the other one may be gone.
            (folder / f"{rank}.stopped").touch()
        ids = torch.rand(40, EXPERTS).argsort(1)[:, :TOP_K].int().contiguous()
        begun = time.monotonic()
        quotas = exchange.quotas((ids.data_ptr(), *ids.shape, 32))
        longest = max(longest, time.monotonic() - begun)
        refused += sum(quotas) != count(ids, physical_experts=EXPERTS, ranks=2)[2]
        told = folder / f"{rank}.new"
        told.write_text(json.dumps({**exchange.tally(), "longest_s": longest, "refused": refused}))
        told.rename(folder / f"{rank}.json")
        time.sleep(PACE_S)
    exchange.close()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # The process group would wait for a rank that is gone.


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
