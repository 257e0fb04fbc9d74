"""``waterfill-rs place``: lawful placements, level after joint plans, on workloads that they have seen and on others."""

import json
import random
from itertools import product

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed: make test installs it")
torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")

import place as bench
import synthetic_routing
from test_replay import EXPERTS, LAYERS, RANKS, dump

from waterfill_rs.cli import main
from waterfill_rs.placement import place, primaries
from waterfill_rs.placement.spread import spread
from waterfill_rs.replay import placements

ROWS = 1_000_000


def workloads(number, layers=1, experts=256, seed=7):
    """``[number, layers, experts]``, of which the first are alike for the same seed and sizes."""
    return synthetic_routing.expert_rows(number, layers, experts, ROWS, seed)


def worst(mapping, loads, ranks, measure=place.joint):
    return max(measure(mapping, [int(row) for row in rows], ranks) for rows in loads)


def sizes(seed):
    """Experts, ranks, redundant experts and ranks a host that have a placement."""
    draws = random.Random(seed)
    while True:
        ranks, experts = draws.randint(1, 12), draws.randint(1, 40)
        possible = [n for n in range(experts * (ranks - 1) + 1) if (experts + n) % ranks == 0]
        if possible:
            per_host = draws.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
            near = [n for n in possible if n <= experts] or possible
            return experts, ranks, draws.choice(draws.choice([possible, near])), per_host


@pytest.mark.parametrize("seed", range(60))
def test_every_expert_is_there_and_no_rank_has_one_twice(seed):
    experts, ranks, redundant, per_host = sizes(seed)
    loads = np.random.default_rng(seed).integers(0, 99, (2, experts)) + (seed % 2)
    mapping = place.place(
        [*loads.tolist(), [1] * experts],
        ranks=ranks,
        redundant=redundant,
        ranks_per_host=per_host,
    )
    assert len(mapping) == experts + redundant and set(mapping) == set(range(experts))
    slots = len(mapping) // ranks
    held = [mapping[rank * slots : (rank + 1) * slots] for rank in range(ranks)]
    assert all(len(set(of)) == slots for of in held)


def test_a_full_rank_makes_room():
    held = place.Held(experts=3, ranks=2, redundant=1)
    for expert, rank in ((0, 0), (1, 1), (2, 1)):
        held.put(expert, rank)
    assert place._make_room(held, 0, 0) == 1
    held.put(0, 1)
    assert [sorted(of) for of in held.of] == [[0, 1], [0, 2]]
    assert held.on == [{0, 1}, {0}, {1}]


@pytest.mark.parametrize("ranks, redundant, per_host", [(16, 32, 8), (32, 32, 8), (8, 64, 2)])
def test_replicas_are_on_as_many_hosts_as_can_be(ranks, redundant, per_host):
    mapping = place.place(
        workloads(2)[:, 0].tolist(), ranks=ranks, redundant=redundant, ranks_per_host=per_host
    )
    hosts = ranks // per_host
    of = [set() for _ in range(256)]
    for physical, expert in enumerate(mapping):
        of[expert].add(physical * hosts // len(mapping))
    replicas = np.bincount(mapping)
    assert [len(one) for one in of] == np.minimum(replicas, hosts).tolist()


@pytest.mark.parametrize("ranks, redundant", [(8, 32), (16, 32), (32, 32)])
def test_replicas_join_all_ranks(ranks, redundant):
    mapping = place.place(workloads(2)[:, 0].tolist(), ranks=ranks, redundant=redundant)
    slots = len(mapping) // ranks
    joined = list(range(ranks))
    for expert in set(mapping):
        on = {joined[p // slots] for p, e in enumerate(mapping) if e == expert}
        joined = [min(on) if one in on else one for one in joined]
    assert set(joined) == {0}


def test_the_same_workloads_give_the_same_placement():
    loads = workloads(2)[:, 0].tolist()
    random.seed(1)
    first = place.place(loads, ranks=16, redundant=16)
    state = random.getstate()
    assert place.place(loads, ranks=16, redundant=16) == first
    assert random.getstate() == state
    # A workload of twice the traffic has the same say.
    twice = [[2 * rows for rows in loads[0]], loads[1]]
    assert place.place(twice, ranks=16, redundant=16) == first
    assert place.resampled(loads[0], 2) == place.resampled(loads[0], 2)
    assert place.resampled(loads[0], 1, 1) != place.resampled(loads[0], 1, 2)


@pytest.mark.parametrize("ranks, redundant", [(8, 0), (8, 16), (32, 32)])
def test_on_its_own_workloads_it_is_no_worse_than_trivial_or_its_start(ranks, redundant):
    for layer in workloads(3, layers=3).transpose(1, 0, 2):
        loads = [place.scaled(rows) for rows in layer.tolist()]
        held = place.Held(256, ranks, redundant)
        place.start(held, loads)
        before = worst(held.mapping(), loads, ranks)
        place.search(held, loads)
        found = worst(held.mapping(), loads, ranks)
        assert found <= before
        trivial = placements.trivial(1, 256, redundant)[0].tolist()
        assert found < worst(trivial, loads, ranks)
        mapping = place.place(layer.tolist(), ranks=ranks, redundant=redundant)
        assert mapping == primaries.first(held.mapping(), loads, ranks)


@pytest.mark.parametrize("ranks, redundant", [(16, 32), (32, 32)])
def test_on_other_workloads_it_is_better_than_replicas_of_the_heaviest(ranks, redundant):
    """``benches/joint.py`` places as EPLB does: the heaviest replica, to the lightest rank."""
    found = bench.judge(workloads(6, layers=5), [0, 1], ranks, redundant)
    assert found["place"].joint - 1 < 0.8 * (found["heaviest first"].joint - 1)
    assert found["place"].with_shared <= found["heaviest first"].with_shared
    assert found["place"].joint < found["spread"].joint < found["trivial"].joint
    for name, one in found.items():
        assert 1 <= one.with_shared <= one.joint <= one.even
        assert (one.primary >= one.joint) == name.startswith(("place", "spread"))
    assert found["place, none redundant"].primary == found["place, none redundant"].even


def test_even_and_joint_are_what_they_say():
    mapping, rows = [0, 1, 0, 2], [6, 1, 5]
    assert place.even(mapping, rows, 2) == pytest.approx(8 / 6)  # 3 + 1 and 3 + 5
    assert place.joint(mapping, rows, 2) == pytest.approx(1)  # 5 + 1 and 1 + 5


# The order of primary replicas.


def place_trivially(experts, redundant):
    return placements.trivial(1, experts, redundant)[0].tolist()


def held(mapping, ranks):
    """Experts of each rank, sorted."""
    return np.sort(np.reshape(mapping, (ranks, -1)), 1).tolist()


def shuffled(mapping, ranks, seed):
    slots = np.reshape(mapping, (ranks, -1))
    return np.random.default_rng(seed).permuted(slots, axis=1).ravel().tolist()


@pytest.mark.parametrize("seed", range(60))
def test_the_first_slots_hold_every_expert_once(seed):
    draws = random.Random(seed)
    ranks, each = draws.randint(1, 16), draws.randint(1, 8)
    experts = ranks * each
    redundant = ranks * draws.randint(0, min(2 * each, each * (ranks - 1)))
    per_host = draws.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
    spread = draws.choice([0.3, 1, 2])
    rows = np.random.default_rng(seed).lognormal(5, spread, (draws.choice([1, 3]), experts))
    loads = [place.scaled(of) for of in rows.tolist()]
    mapping = place.place(loads, ranks=ranks, redundant=redundant, ranks_per_host=per_host)
    assert sorted(np.reshape(mapping, (ranks, -1))[:, :each].ravel()) == list(range(experts))
    assert primaries.are_first(mapping, experts, ranks)
    # The order of slots before does not decide which experts a rank holds.
    other = primaries.first(shuffled(mapping, ranks, seed), loads, ranks)
    assert held(other, ranks) == held(mapping, ranks)
    assert primaries.are_first(other, experts, ranks)


@pytest.mark.parametrize("ranks, redundant", [(4, 16), (8, 32), (16, 32), (32, 64)])
def test_primaries_are_more_level_than_experts_in_order(ranks, redundant):
    for layer in workloads(3, layers=2).transpose(1, 0, 2):
        loads = [place.scaled(rows) for rows in layer.tolist()]
        mapping = place.place(loads, ranks=ranks, redundant=redundant)
        in_order = list(range(256))
        found = worst(mapping, loads, ranks, primaries.level)
        assert found - 1 < 0.6 * (worst(in_order, loads, ranks, primaries.level) - 1)
        single = [0] * len(mapping)
        for p, expert in enumerate(mapping):
            if p % (len(mapping) // ranks) < 256 // ranks:
                single[p] = int(layer[0][expert])
        assert primaries.level(mapping, layer[0].tolist(), ranks) == pytest.approx(
            max(np.reshape(single, (ranks, -1)).sum(1)) / (sum(single) / ranks)
        )


def test_primaries_are_nearly_as_level_as_any_choice_of_a_small_layer():
    """Beside every choice. The plans alone, of each workload and of their mean, miss the best of some layers."""
    beside_best, plans_beside_best = [], []
    for seed in range(30):
        draws = np.random.default_rng(seed)
        loads = [place.scaled(rows) for rows in draws.lognormal(5, 1, (2, 8)).tolist()]
        mapping = place.place(loads, ranks=4, redundant=8)

        def slowest(at, loads=loads):
            return max(np.bincount(at, rows, minlength=4).max() for rows in loads)

        where = [[p // 4 for p, e in enumerate(mapping) if e == expert] for expert in range(8)]
        choices = [c for c in product(*where) if np.bincount(c, minlength=4).tolist() == [2] * 4]
        best = min(map(slowest, choices))
        mean = [sum(rows) // 2 for rows in zip(*loads, strict=True)]
        plans = [primaries._chosen(mapping, rows, 4) for rows in [mean, *loads]]
        plans_beside_best.append(min(slowest(np.array(plan) // 4) for plan in plans) / best)
        at = [0] * 8
        for p, expert in enumerate(mapping):
            if p % 4 < 2:
                at[expert] = p // 4
        beside_best.append(slowest(at) / best)
    assert max(beside_best) < 1.03
    assert sum(ratio == 1 for ratio in beside_best) >= 28
    assert sum(beside_best) < sum(plans_beside_best)


def test_where_ranks_cannot_have_equally_many_the_order_stays():
    # Placed trivially, rank 2 of 8 holds experts 10 to 14 and no other rank does.
    trivial = place_trivially(32, 8)
    assert primaries.first(trivial, [[1] * 32], 8) == trivial
    assert primaries.fewest(trivial, 32, 8) == 5 and not primaries.are_first(trivial, 32, 8)
    # 6 experts do not divide over 4 ranks, though 6 + 2 do.
    six = place.place([[1] * 6], ranks=4, redundant=2)
    assert primaries.first(six, [[1] * 6], 4) == six and not primaries.are_first(six, 6, 4)


def test_a_start_that_allows_no_order_is_mended(monkeypatch):
    # Rank 2 alone has its three experts, where two would be even.
    start = [[0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 6, 7]]

    def put(held, loads):
        for rank, of in enumerate(start):
            for expert in of:
                held.put(expert, rank)

    assert primaries.fewest([e for of in start for e in of], 8, 4) == 3
    monkeypatch.setattr(place, "start", put)
    mapping = place.place([[9, 8, 7, 6, 5, 4, 3, 2]], ranks=4, redundant=4)
    assert primaries.are_first(mapping, 8, 4)
    assert np.bincount(mapping).tolist() == [3, 2, 2, 1, 1, 1, 1, 1]
    assert all(len(set(of)) == 3 for of in held(mapping, 4))


# The command.


def counts_file(path, counts):
    path.write_text(json.dumps({"logical_count": np.asarray(counts).tolist()}))
    return str(path)


@pytest.fixture
def two(tmp_path):
    """Two recordings of one model with a dense layer."""
    loads = workloads(2, layers=3, experts=32)
    loads[:, 0] = 0
    return [counts_file(tmp_path / f"{i}.json", one) for i, one in enumerate(loads)]


def run(capsys, recordings, output, *options):
    code = main(["place", *recordings, "-o", str(output), *options])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def refused(capsys, recordings, output, *options):
    assert main(["place", *recordings, "-o", str(output), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_replay_reads_the_file_and_its_table_says_what_replay_finds(two, tmp_path, capsys):
    output = tmp_path / "placed.json"
    said = run(capsys, two, output, "--ep", "8", "--redundant", "8")
    content = json.loads(output.read_text())
    assert list(content) == ["physical_to_logical_map"]  # sglang takes each key for an argument
    (dense, *_) = content["physical_to_logical_map"]
    assert dense == placements.trivial(1, 32, 8)[0].tolist()
    out = tmp_path / "replay.json"
    options = ["--top-k", "8", "--ep", "8", "--placement", str(output), "--json", str(out)]
    assert main(["replay", two[0], *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["layer"] for row in rows} == {1, 2}
    line = next(line for line in said.splitlines() if line.startswith(two[0]))
    loads = json.loads((tmp_path / "0.json").read_text())["logical_count"]
    measures = (place.even, place.joint, primaries.level)
    for measure, cell in zip(measures, line.split()[-3:], strict=True):
        found = [measure(content["physical_to_logical_map"][i], loads[i], 8) for i in (1, 2)]
        assert float(cell) == pytest.approx(sum(found) / 2, abs=6e-4)
    assert "2 layers, and 1 without rows" in said and "worst resampled" in said
    assert "No order of primary replicas" not in said
    assert "With live replicas" in said and "sglang chooses replicas itself" in said


def test_recordings_of_tokens_need_no_top_k(tmp_path, capsys):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for rank in range(RANKS):
        torch.save(dump(rank), folder / f"{rank}.pt")
    output = tmp_path / "placed.json"
    run(capsys, [str(folder)], output, "--ep", "2", "--redundant", "2", "--ranks-per-host", "1")
    mapping = json.loads(output.read_text())["physical_to_logical_map"]
    assert len(mapping) == LAYERS
    assert {len(of_layer) for of_layer in mapping} == {EXPERTS + 2}


def test_trivial_replicas_that_make_balance_worse_are_named(tmp_path, capsys):
    level = counts_file(tmp_path / "level.json", [[10] * 16])
    output = tmp_path / "placed.json"
    said = run(capsys, [level], output, "--ep", "4", "--redundant", "4")
    assert (
        "4 redundant experts placed trivially, sglang's default, make balance worse than none: 1.250 for 1.000."
        in said
    )
    # The first 4 experts are hot, so these replicas help.
    hot = counts_file(tmp_path / "hot.json", [[40] * 4 + [10] * 12])
    assert "worse than none" not in run(capsys, [hot], output, "--ep", "4", "--redundant", "4")


def test_the_table_has_what_a_server_does_without_a_placement(tmp_path, capsys):
    counts = counts_file(tmp_path / "counts.json", [[10 + e for e in range(16)]])
    output = tmp_path / "placed.json"
    said = run(capsys, [counts], output, "--ep", "4", "--redundant", "8").splitlines()
    heads = next(line for line in said if "trivial" in line).split()
    figures = next(line for line in said if line.startswith(str(counts))).split()[1:]
    at = 2 * (heads.index("spread") - 1)  # "no redundant" is two words.
    row = spread(16, 8, 4)
    rows = place.scaled([10 + e for e in range(16)])
    expected = [f"{measure(row, rows, 4):.3f}" for measure in (place.even, place.joint)]
    assert figures[at : at + 2] == expected
    assert "spread" not in run(capsys, [counts], output, "--ep", "4", "--redundant", "0")


def test_what_does_not_fit_is_refused_with_its_numbers(two, tmp_path, capsys):
    output = tmp_path / "placed.json"
    some = ["--ep", "8", "--redundant", "8"]
    error = refused(capsys, two, output, "--ep", "8", "--redundant", "3")
    assert "32 logical experts and 3 redundant ones do not divide over 8 ranks" in error
    error = refused(capsys, two, output, "--ep", "2", "--redundant", "34")
    assert "--redundant 34: " in error and "at most 32 redundant ones" in error
    error = refused(capsys, two, output, *some, "--ranks-per-host", "3")
    assert "--ranks-per-host 3: 8 ranks do not divide" in error
    assert "--ep 0: give at least 1" in refused(
        capsys, two, output, "--ep", "0", "--redundant", "8"
    )
    assert "--redundant -8: give at least 0" in refused(
        capsys, two, output, "--ep", "8", "--redundant", "-8"
    )
    other = counts_file(tmp_path / "other.json", np.ones((3, 16), int))
    error = refused(capsys, [two[0], other], output, *some)
    assert f"{other}: 16 experts in 3 layers, {two[0]} has 32 in 3" in error
    assert "would be overwritten" in refused(capsys, two, two[1], *some)
    assert "give one in .json" in refused(capsys, two, tmp_path / "placed.pt", *some)
    assert not output.exists()


def test_where_experts_do_not_divide_slots_stay_and_a_line_says_so(tmp_path, capsys):
    output = tmp_path / "placed.json"
    of_ten = counts_file(tmp_path / "ten.json", [list(range(1, 11))])
    said = run(capsys, [of_ten], output, "--ep", "4", "--redundant", "2")
    assert "No order of primary replicas: 10 logical experts do not divide over 4 ranks." in said
    line = next(line for line in said.splitlines() if line.startswith(of_ten))
    assert line.split()[-1] == "-"


def test_layers_that_allow_no_order_are_named_with_their_numbers(
    two, tmp_path, capsys, monkeypatch
):
    first = primaries.first

    def not_in_the_first(mapping, loads, ranks):
        monkeypatch.setattr(primaries, "first", first)
        return place_trivially(32, 8)

    monkeypatch.setattr(primaries, "first", not_in_the_first)
    said = run(capsys, two, tmp_path / "placed.json", "--ep", "8", "--redundant", "8")
    assert (
        "No order of primary replicas in 1 of 3 layers (1): a rank has at least 5 of them where 4 would be even."
        in said
    )


def test_eplb_without_sglang_is_refused_before_the_work(two, tmp_path, capsys, monkeypatch):
    from waterfill_rs.replay import place_command

    monkeypatch.setattr(place_command, "find_spec", lambda name: None)
    output = tmp_path / "placed.json"
    error = refused(capsys, two, output, "--ep", "8", "--redundant", "8", "--beside-eplb")
    assert error.startswith("waterfill-rs: --beside-eplb: sglang is not installed here")
    assert not output.exists()
