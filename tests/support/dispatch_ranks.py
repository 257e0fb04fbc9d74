"""What ranks' processes do in place of a dispatch. A module of its own: a process that starts does not load torch."""

import os
import time


def report_times(rank, job, reports):
    _dispatch(rank, job, reports)
    if rank == 0:
        reports.put(("said", 0, "the forms agree"))
        for tokens in job.prefill_tokens:
            reports.put(("prefill", tokens, (float(tokens + job.ranks), tokens / 2)))
        reports.put(("end", 0, None))


def fail_on_rank_1(rank, job, reports):
    if rank == 1:
        raise OSError("no NVLink")
    time.sleep(60)


def die_on_rank_1(rank, job, reports):
    if rank == 1:
        os._exit(3)
    time.sleep(60)


def fail_in_prefill(rank, job, reports):
    _dispatch(rank, job, reports)
    if rank == 0:
        raise RuntimeError("forms differ")
    time.sleep(60)


def die_in_prefill(rank, job, reports):
    _dispatch(rank, job, reports)
    if rank == 0:
        reports.close()
        reports.join_thread()  # So that what was reported arrives.
        os._exit(3)
    time.sleep(60)


def no_memory(rank, job, reports):
    _dispatch(rank, job, reports)
    if rank == 0:
        reports.put(("end", 0, None))


def _dispatch(rank, job, reports):
    if rank == 0:
        for tokens in job.dispatch_tokens:
            reports.put(("dispatch", tokens, float(tokens + job.ranks)))
