"""What ranks' processes do in place of a dispatch. A module of its own: a process that starts does not load torch."""

import os
import time


def report_times(rank, job, reports):
    if rank == 0:
        for tokens in job.tokens:
            reports.put((tokens, float(tokens + job.ranks)))


def fail_on_rank_1(rank, job, reports):
    if rank == 1:
        raise OSError("no NVLink")
    time.sleep(60)


def die_on_rank_1(rank, job, reports):
    if rank == 1:
        os._exit(3)
    time.sleep(60)
