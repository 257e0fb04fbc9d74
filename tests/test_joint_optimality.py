"""``joint`` against a linear program, on real DeepSeek-V3 counts with a placement made for another workload."""

from pathlib import Path

import pytest

import waterfill_rs

numpy = pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")
optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
sparse = pytest.importorskip("scipy.sparse")

COUNTS = Path(__file__).parents[2] / "shared" / "data" / "dsv3_logical_count.npz"
EXPERTS, TOP_K = 256, 8


def place(counts, ranks, redundant):
    """Physical to logical: replicas to the heaviest expert a replica, then heaviest to the lightest rank."""
    replicas = numpy.ones(EXPERTS, int)
    for _ in range(redundant):
        replicas[numpy.argmax(counts / replicas)] += 1
    share = counts / replicas
    per_rank = (EXPERTS + redundant) // ranks
    held = [[] for _ in range(ranks)]
    load = numpy.zeros(ranks)
    for expert in numpy.argsort(-share, kind="stable"):
        for _ in range(replicas[expert]):
            free = [r for r in range(ranks) if len(held[r]) < per_rank]
            rank = min(free, key=lambda r: (expert in held[r], load[r]))
            held[rank].append(int(expert))
            load[rank] += share[expert]
    return [expert for rank in held for expert in rank]


def lp_optimum(counts, mapping, ranks, tokens):
    """Least slowest rank when rows may be split in fractions."""
    physical = len(mapping)
    per_rank = physical // ranks
    top = physical + ranks
    logical = sparse.lil_matrix((EXPERTS + 1, top + 1))
    for p, expert in enumerate(mapping):
        logical[expert, p] = 1
    logical[EXPERTS, physical:top] = 1
    below = sparse.lil_matrix((ranks, top + 1))
    for rank in range(ranks):
        below[rank, rank * per_rank : (rank + 1) * per_rank] = 1
        below[rank, physical + rank] = 1
        below[rank, top] = -1
    cost = numpy.zeros(top + 1)
    cost[top] = 1
    total = numpy.append(counts, tokens)
    solved = optimize.linprog(
        cost, A_ub=below.tocsr(), b_ub=numpy.zeros(ranks), A_eq=logical.tocsr(), b_eq=total
    )
    assert solved.success, solved.message
    return solved.fun


@pytest.mark.skipif(not COUNTS.exists(), reason="the routing data of shared/data is not here")
@pytest.mark.parametrize("ranks, redundant", [(8, 32), (16, 32), (32, 32), (64, 64)])
def test_joint_is_within_a_thousandth_of_the_linear_program(ranks, redundant):
    data = numpy.load(COUNTS)
    workloads = [data[name].astype(numpy.int64) for name in sorted(data.files)]
    worst, before, after = 0.0, [], []
    for layer in range(3, 61, 6):
        counts = workloads[-1][layer].copy()
        mapping = place(workloads[0][layer], ranks, redundant)
        routed = numpy.zeros(len(mapping), numpy.int64)
        for expert in range(EXPERTS):  # as the router splits them: evenly
            held = [p for p, e in enumerate(mapping) if e == expert]
            for index, p in enumerate(held):
                routed[p] = (counts[expert] + index) // len(held)
        tokens = int(counts.sum()) // TOP_K
        sources = [tokens // ranks + (r < tokens % ranks) for r in range(ranks)]
        plan = waterfill_rs.plan(
            routed, sources, ranks=ranks, physical_to_logical=mapping, policy="joint"
        )
        best = lp_optimum(counts, mapping, ranks, tokens)
        worst = max(worst, plan.optimum / best)
        mean = (counts.sum() + tokens) / ranks
        live = waterfill_rs.plan(routed, sources, ranks=ranks)
        before.append(live.optimum / mean)
        after.append(plan.optimum / mean)
    print(
        f"EP{ranks}+{redundant}: live {numpy.mean(before):.3f}, joint {numpy.mean(after):.3f} "
        f"of the mean; at most {worst - 1:.4%} over the linear program"
    )
    assert worst <= 1.001
