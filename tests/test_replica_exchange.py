"""Calls that choose replicas, over a board on the CPU: the plan's rows, the same logical experts, and what keeps them from it."""

import os
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
import torch.distributed as dist

import waterfill_rs
from waterfill_rs import _native
from waterfill_rs.exchange import device as on_device
from waterfill_rs.exchange.device import DeviceExchange, DeviceGroupExchange
from waterfill_rs.exchange.host import SoloExchange, _primary
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.replicas import ReplicaTables
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.operate.status import describe
from waterfill_rs.torch import count, move_up

RANKS, LOGICAL, REDUNDANT, TOP_K, LAYERS = 3, 20, 4, 4, 3
EXPERTS = LOGICAL + REDUNDANT
CALLS = 60
PATIENT = {"cap_us": 10_000_000}


def maps_of(seed, layers=LAYERS):
    """``[layers, P]``: some experts have two replicas or more, in any place."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat(
            [torch.arange(LOGICAL), torch.randint(LOGICAL, (REDUNDANT,), generator=generator)]
        )[torch.randperm(EXPERTS, generator=generator)]
        for _ in range(layers)
    ]
    return torch.stack(rows)


def tables_of(physical_to_logical, redundant=REDUNDANT, **where):
    return ReplicaTables(RANKS, redundant, physical_to_logical, **where)


def ids_of(rank, call, mapping):
    """Physical ids as sglang might choose them, uneven; some ranks are idle, some rows padding."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    rows = 0 if (call + rank) % 5 == 0 else int(torch.randint(1, 90, (), generator=generator))
    liked = torch.rand(rows, LOGICAL, generator=generator) + torch.linspace(0, 0.8, LOGICAL)
    logical = liked.argsort(1, descending=True)[:, :TOP_K]
    first = torch.tensor([int((mapping == expert).nonzero()[0]) for expert in range(LOGICAL)])
    ids = first[logical].int().contiguous()
    if rows > 2:
        ids[1] = -1
    return ids


def planned(call, mapping, *, shared):
    """The plan of all ranks' counts."""
    counted = [
        count(ids_of(rank, call, mapping), physical_experts=EXPERTS, ranks=RANKS)
        for rank in range(RANKS)
    ]
    return waterfill_rs.plan(
        [sum(column) for column in zip(*(counts for counts, _, _ in counted), strict=True)],
        [tokens if shared else 0 for _, _, tokens in counted],
        ranks=RANKS,
        physical_to_logical=mapping.tolist(),
        visits=[visits if shared else [0] * RANKS for _, visits, _ in counted],
        policy="replicas",
    )


def on_ranks(run, ranks=RANKS):
    """``run(rank, store)`` on a thread a rank; what each gave or raised."""
    store, found = dist.HashStore(), [None] * ranks

    def one(rank):
        try:
            found[rank] = run(rank, store)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def opened(rank, store, maps, pace="inline"):
    settings = BoardSettings(**PATIENT, pace=pace)
    return open_exchange(
        store, Member(RANKS, EXPERTS, rank), settings=settings, replicas=tables_of(maps)
    )


def call(exchange, ids, layer, *, shared):
    """Routed ids, not moved up, and each rank's shared rows, of one call."""
    slots = EXPERTS // RANKS + 1
    if not shared:
        moved = exchange.move_up(ids, layer=layer)
        assert moved.dtype == torch.int64
        return torch.where(moved < 0, moved, moved - moved // slots), [0] * RANKS
    wide, weights = exchange.expand(ids, torch.ones(ids.shape), 0.4, layer=layer)
    assert wide.dtype == ids.dtype and weights.shape == wide.shape
    routed, to = wide[:, :-1], wide[:, -1]
    rows = torch.bincount(to[to >= 0] // slots, minlength=RANKS).tolist()
    return torch.where(routed < 0, routed, routed - routed // slots), rows


def same_experts(chosen, ids, mapping):
    valid = ids >= 0
    return torch.equal(chosen[~valid].int(), ids[~valid]) and torch.equal(
        mapping[chosen[valid].long()], mapping[ids[valid].long()]
    )


@pytest.mark.parametrize("pace", ["inline", "park"])
@pytest.mark.parametrize("mixed", [False, True], ids=["fused", "fused and overlapped"])
def test_rows_are_those_of_the_plan_and_of_the_same_experts(pace, mixed):
    maps = maps_of(1)

    def run(rank, store):
        exchange = opened(rank, store, maps, pace)
        found = [
            call(
                exchange,
                ids_of(rank, c, maps[c % LAYERS]),
                c % LAYERS,
                shared=not mixed or c % 2 == 0,
            )
            for c in range(CALLS)
        ]
        tally, seen = exchange.tally(), {"name": "seen", **exchange.board.snapshot()}
        exchange.close()
        return found, tally, seen

    of_ranks = on_ranks(run)
    moved = 0
    for c in range(CALLS):
        mapping, shared = maps[c % LAYERS], not mixed or c % 2 == 0
        plan = planned(c, mapping, shared=shared)
        rows, shared_rows = torch.zeros(EXPERTS, dtype=torch.int64), [0] * RANKS
        for rank, (found, *_) in enumerate(of_ranks):
            ids, (chosen, sent) = ids_of(rank, c, mapping), found[c]
            assert same_experts(chosen, ids, mapping)
            moved += int((chosen != ids).sum())
            rows += torch.bincount(chosen[chosen >= 0].long(), minlength=EXPERTS)
            shared_rows = [total + own for total, own in zip(shared_rows, sent, strict=True)]
        assert rows.tolist() == plan.replica_rows, c
        assert shared_rows == (plan.shared_rows if shared else [0] * RANKS), c
    assert moved > 500
    for _, tally, seen in of_ranks:
        assert tally["live"] == tally["calls"] == CALLS
        told = f"replicas of {REDUNDANT} redundant experts chosen by {CALLS} plans"
        assert seen["redundant"] == REDUNDANT and told in describe(seen)


@pytest.mark.parametrize("layer", [None, -1, LAYERS, 9])
def test_a_layer_that_the_map_has_not_is_served_without_replicas(layer):
    """As a draft model's; beside one that it has."""
    maps = maps_of(2)
    calls = range(1, 9)

    def run(rank, store):
        exchange = opened(rank, store, maps)
        found = [
            [call(exchange, ids_of(rank, c, maps[0]), one, shared=s)[0] for c in calls]
            for one in (layer, 0)
            for s in (True, False)
        ]
        exchange.close()
        return found

    moved = 0
    for rank, found in enumerate(on_ranks(run)):
        for c, *without, fused, overlapped in zip(calls, *found, strict=True):
            ids = ids_of(rank, c, maps[0])
            assert all(torch.equal(chosen.int(), ids) for chosen in without)
            assert same_experts(fused, ids, maps[0]) and same_experts(overlapped, ids, maps[0])
            moved += int((fused != ids).sum())
    assert moved > 0


def test_a_map_renewed_in_mid_traffic_is_the_plans_from_that_call_on():
    """Rank 1 is a call late: in that call all keep what sglang chose."""
    before, after = maps_of(3), maps_of(4)
    at = 20
    after[0] = before[0]
    changed = [1, 2]

    def mapping_of(c, rank=0):
        return (before if c < at + (rank == 1) else after)[c % LAYERS]

    def run(rank, store):
        exchange, found = opened(rank, store, before), []
        for c in range(2 * at):
            if c == at + (rank == 1):
                exchange.replicas.renew(changed, after)
            ids = ids_of(rank, c, mapping_of(c, rank))
            found.append(call(exchange, ids, c % LAYERS, shared=True))
        exchange.close()
        return found

    assert at % LAYERS in changed
    of_ranks = on_ranks(run)
    for c in range(2 * at):
        rows = torch.zeros(EXPERTS, dtype=torch.int64)
        for rank, found in enumerate(of_ranks):
            ids, chosen = ids_of(rank, c, mapping_of(c, rank)), found[c][0]
            assert same_experts(chosen, ids, mapping_of(c, rank))
            assert c != at or torch.equal(chosen, ids)
            rows += torch.bincount(chosen[chosen >= 0].long(), minlength=EXPERTS)
        if c != at:
            assert rows.tolist() == planned(c, mapping_of(c), shared=True).replica_rows, c


def test_ranks_whose_maps_differ_keep_their_replicas_and_have_live_quotas():
    one, other = maps_of(5), maps_of(6)

    def run(rank, store):
        maps = other if rank == 2 else one
        exchange = opened(rank, store, maps)
        found = call(exchange, ids_of(rank, 1, maps[0]), 0, shared=True)
        tally = exchange.tally()
        exchange.close()
        return found, tally

    for rank, ((chosen, sent), tally) in enumerate(on_ranks(run)):
        ids = ids_of(rank, 1, (other if rank == 2 else one)[0])
        assert torch.equal(chosen, ids) and sum(sent) == int((ids[:, 0] >= 0).sum())
        assert tally["live"] == 1


def test_ranks_of_other_redundant_experts_refuse_each_other():
    def run(rank, store):
        # The same physical experts, of more or fewer logical ones.
        few = torch.arange(EXPERTS).repeat(1, 1) % (LOGICAL - 1)
        tables = [tables_of(maps_of(1)), tables_of(few, REDUNDANT + 1), None][rank]
        return open_exchange(store, Member(RANKS, EXPERTS, rank), replicas=tables)

    for error in on_ranks(run):
        assert isinstance(error, ValueError) and "redundant is" in str(error), error


def test_tables_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"tables of \(ranks, experts\) \(3, 24\): give those of"):
        open_exchange(dist.HashStore(), Member(2, EXPERTS, 0), replicas=tables_of(maps_of(1)))


# Primary replicas


def in_place(seed):
    """As ``place`` orders a layer: the first slots of each rank hold each expert once. ``LOGICAL`` does not divide over three."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(EXPERTS - RANKS, generator=generator)
    more = torch.randint(EXPERTS - RANKS, (RANKS,), generator=generator)
    return torch.cat([experts.view(RANKS, -1), more[:, None]], 1).flatten().repeat(LAYERS, 1)


def ordered_tables(seed=1, **where):
    """Tables of three redundant experts, each rank's last, and their maps."""
    maps = in_place(seed)
    return tables_of(maps.clone(), RANKS, **where), maps


def test_not_live_ids_go_to_primary_replicas_and_it_is_no_call():
    maps = maps_of(1)
    maps[1][maps[1] == 3] = 4
    last = torch.tensor([int((maps[0] == expert).nonzero()[-1]) for expert in range(LOGICAL)])

    def run(rank, store):
        exchange, found = opened(rank, store, maps), []
        for c in range(CALLS if rank else 1):  # As many as a rank likes: nobody waits for another.
            ids = ids_of(rank, c, maps[0])
            if c % 2:
                ids = torch.where(ids < 0, ids, last[maps[0][ids.clamp(min=0).long()]].int())
            for layer in (0, 1, None, LAYERS):
                found.append((layer, ids, exchange.move_up(ids, layer=layer, live=False)))
        none = torch.tensor([[-1, -5, 0, EXPERTS - 1]], dtype=torch.int32)
        found.append((0, none, exchange.move_up(none, layer=0, live=False)))
        with pytest.raises(ValueError, match="expert id 24 in row 0"):
            exchange.move_up(none + 1, layer=0, live=False)
        before = exchange.tally()["calls"]
        chosen, _ = call(exchange, ids_of(rank, 1, maps[0]), 0, shared=False)
        tally = exchange.tally()
        exchange.close()
        return found, before, tally, same_experts(chosen, ids_of(rank, 1, maps[0]), maps[0])

    table = waterfill_rs._native.ReplicaTable(RANKS, maps[0].tolist())
    primaries = torch.tensor(table.primaries)
    where, moved = dict(physical_experts=EXPERTS, ranks=RANKS), 0
    for found, before, tally, live_is_right in on_ranks(run):
        assert before == 0 and tally["calls"] == tally["live"] == 1 and live_is_right
        for layer, ids, chosen in found:
            # Layer 1 has no table, and the map has no more layers: those keep what sglang chose.
            own = ids.clone()
            if layer == 0:
                own[ids >= 0] = primaries[ids[ids >= 0].long()].int()
                moved += int((own != ids).sum())
            assert chosen.dtype == torch.int64 and torch.equal(chosen, move_up(own, **where))
    assert moved > 500
    # One replica of each expert alone.
    assert len(set(primaries.tolist())) == LOGICAL == len(set(maps[0][primaries].tolist()))
    assert torch.equal(maps[0][primaries], maps[0])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_batch_without_rows_has_primaries_too(ids):
    exchange, _ = ordered_tables()
    assert _primary(torch.empty((0, TOP_K), dtype=ids), exchange.primaries(0)).shape == (0, TOP_K)
    one = _primary(torch.tensor([[0, EXPERTS, -1]], dtype=ids), exchange.primaries(0))
    assert one.dtype == ids and one.tolist() == [[0, EXPERTS, -1]]


def test_first_primaries_are_as_many_on_each_rank():
    tables, maps = ordered_tables()
    each = EXPERTS // RANKS
    for layer in range(LAYERS):
        assert tables.first_primaries(layer) == each - 1
        assert {primary % each for primary in tables.primaries(layer)} == set(range(each - 1))
    assert tables.first_primaries(None) is tables.first_primaries(LAYERS) is None
    assert tables.primaries(None) is tables.primaries(LAYERS) is None
    maps[0, [0, each - 1]] = maps[0, [each - 1, 0]]
    tables.renew([0], maps)
    # The first expert of rank 0 is its last one now, unless that is another replica of it.
    assert tables.first_primaries(0) is None and tables.first_primaries(1) == each - 1


def test_a_map_may_not_change_where_graphs_run_the_first_primaries_alone():
    logical = in_place(1)
    tables = tables_of(logical.clone(), RANKS, logical=logical)
    learned, (held, _) = [], tables.primaries_on_device(1)
    before, prints = held.clone(), tables.fingerprints
    tables.teach(lambda layer, table: learned.append(layer))
    learned.clear()
    assert [tables.keep_first_primaries(layer) for layer in (None, 1, LAYERS)] == [None, 7, None]
    tables.renew([1], in_place(2))
    assert learned == [1] and not torch.equal(held, before), "other experts may come first"
    before, prints = held.clone(), tables.fingerprints
    moved = in_place(2)
    moved[1, [0, 7]] = moved[1, [7, 0]]
    text = r"the map of layer 1 changed, and the first 7 experts of each rank .* Start the server with --waterfill-rs-replicas live"
    unusable = moved.clone()
    unusable[1] %= EXPERTS - RANKS - 1
    for changed in (moved, unusable):
        with pytest.raises(RuntimeError, match=text):
            tables.renew([0, 1], changed)
        assert tables.fingerprints == prints and not tables.refused, "before anything is written"
        assert torch.equal(held, before) and learned == [1]
    tables.kept_first.clear()
    tables.renew([0, 1], moved)
    assert tables.first_primaries(1) is None and learned == [1, 0, 1]
    assert tables.keep_first_primaries(1) is None and not tables.kept_first


def test_own_counts_choose_no_replicas():
    lone = ReplicaTables(1, REDUNDANT, maps_of(1))
    exchange = open_exchange(dist.HashStore(), Member(1, EXPERTS, 0), replicas=lone)
    assert isinstance(exchange, SoloExchange) and exchange.replicas is None
    ids = ids_of(0, 1, maps_of(1)[0])
    moved = exchange.move_up(ids, layer=0)
    assert torch.equal(moved, move_up(ids, physical_experts=EXPERTS, ranks=1))
    assert torch.equal(moved, exchange.move_up(ids, layer=0, live=False))


def test_what_is_refused_is_no_call():
    def run(rank, store):
        exchange = opened(rank, store, maps_of(1))
        bad = torch.full((2, TOP_K), EXPERTS, dtype=torch.int32)
        for refused in (
            lambda: exchange.move_up(bad, layer=0),
            lambda: exchange.expand(bad, torch.ones(bad.shape), 1.0, layer=0),
            lambda: exchange.expand(bad - 1, torch.ones(bad.shape).double(), 1.0, layer=0),
        ):
            with pytest.raises(ValueError, match=r"expert id 24 in row 0|topk_weights is"):
                refused()
        ids = ids_of(rank, 1, maps_of(1)[0])
        chosen, _ = call(exchange, ids, 0, shared=True)
        return exchange.tally()["live"], same_experts(chosen, ids, maps_of(1)[0])

    assert on_ranks(run) == [(1, True)] * RANKS


# The tables


def test_a_planner_of_replicas_plans_by_rows_alone():
    run = int.from_bytes(os.urandom(16), "little")
    board = _native.Board.create(f"wf-test-{os.getpid()}-rows", RANKS, EXPERTS, run, REDUNDANT)
    board.unlink()
    model = waterfill_rs.CostModel.roofline(weights_us=11.2, row_us=0.061, tile=64)
    for make in (
        lambda: _native.Port(board, 0, model, plans_patience_us=1000),
        lambda: _native.PlannerThread(board, model, patience_us=1000, pace="park", core=None),
    ):
        with pytest.raises(ValueError, match="4 redundant experts: give that of rows"):
            make()


def test_tables_on_a_device_stay_where_they_are():
    logical, learned = maps_of(7), []
    tables = tables_of(logical.clone(), logical=logical)
    tables.teach(lambda layer, table: learned.append((layer, table.fingerprint)))
    assert learned == list(enumerate(tables.fingerprints)) and len(set(tables.fingerprints)) > 1
    (words, of_layer), before = tables.on_device(1), tables.fingerprints
    primaries, beside = tables.primaries_on_device(1)
    addresses = words.data_ptr(), of_layer.data_ptr(), primaries.data_ptr(), beside.data_ptr()
    assert words.tolist() == tables.of(1).words and torch.equal(of_layer, logical[1])
    assert primaries.dtype == torch.int32 and primaries.tolist() == tables.primaries(1)
    assert beside.data_ptr() == of_layer.data_ptr() == logical[1].data_ptr()
    changed = maps_of(8)
    tables.renew([1], changed)
    again = *tables.on_device(1), *tables.primaries_on_device(1)
    assert tuple(tensor.data_ptr() for tensor in again) == addresses
    table = waterfill_rs._native.ReplicaTable(RANKS, changed[1].tolist())
    assert words.tolist() == table.words and primaries.tolist() == table.primaries
    assert tables.primaries_on_device(0)[0].tolist() == tables.primaries(0)
    assert [a == b for a, b in zip(before, tables.fingerprints, strict=True)] == [1, 0, 1]
    assert learned[LAYERS:] == [(1, tables.fingerprints[1])]
    for none in (None, LAYERS, -1):
        words, of_layer = tables.on_device(none)
        assert words[:2].tolist() == [0, 0] and of_layer is None
        assert words.shape == tables.on_device(0)[0].shape
        assert tables.primaries_on_device(none) == (None, None)
    for ask in (tables_of(maps_of(1)).on_device, tables_of(maps_of(1)).primaries_on_device):
        with pytest.raises(RuntimeError, match="these tables are not on a device"):
            ask(0)


def test_a_planner_learns_a_map_before_the_device_has_it():
    logical = maps_of(7)
    tables = tables_of(logical.clone(), logical=logical)
    words, seen = tables.on_device(2)[0], []
    tables.teach(lambda layer, table: seen.append((table.fingerprint, words[0].item())))
    seen.clear()
    old = tables.of(2).words[0]
    tables.renew([2], maps_of(8))
    assert seen == [(tables.fingerprints[2], old)] and words[0].item() == tables.of(2).words[0]


def test_a_layer_whose_map_cannot_be_used_is_named_and_has_none():
    maps = maps_of(1)
    maps[1][maps[1] == 3] = 4
    maps[2] = torch.arange(EXPERTS) % (LOGICAL + 1)
    tables = tables_of(maps)
    assert sorted(tables.refused) == [1, 2]
    assert "logical expert 3" in tables.refused[1]
    assert "3 redundant experts, and the board was made for 4" in tables.refused[2]
    assert tables.fingerprints[1:] == [0, 0] and tables.of(1) is tables.of(2) is None
    assert tables.replicated[0] > 0 == tables.replicated[1]
    assert tables.primaries(1) is tables.first_primaries(1) is None
    own = tables_of(maps.clone(), logical=maps).primaries_on_device(1)[0]
    assert own.tolist() == list(range(EXPERTS)), "on a device each is its own primary replica"
    tables.renew([1], maps_of(1))
    assert sorted(tables.refused) == [2] and tables.of(1) is not None


# On a device: which launches, in which order; the kernel itself is tested where there is one


class Launches:
    """In the place of the kernel: what was asked of it."""

    words = 1 + RANKS + RANKS + REDUNDANT + 1 + 1
    """Tokens, visits, loads, rows of jobs, bits of up to 32 experts, the fingerprint."""

    def __init__(self, *_, board, redundant, **__):
        self.asked, self.board = [], board
        assert redundant == REDUNDANT

    def __call__(self, ids, weights, shared_weight, *, quotas=None, cap_us=None, gathered=None):
        self.asked.append(("expand", quotas, cap_us, gathered))
        return ids, weights

    def move_up(self, ids, primaries=None, logical=None):
        self.asked.append(("move_up", primaries, logical))
        return ids + 2

    def count(self, ids, weights, out, *, table=None, moved=False):
        out.fill_(7)
        self.asked.append(("count", table, moved))

    def choose_replicas(self, ids, table, logical, *, moved, cap_us, gathered=None):
        self.asked.append(("choose", table, logical, moved, cap_us, gathered))
        return ids + 1, None if moved else "quotas"


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(on_device, "Expander", Launches)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def gather(out, own, group):
        out.copy_(own.repeat(RANKS))

    monkeypatch.setattr(on_device, "_all_gather", gather)
    name = f"waterfill-rs-{os.getpid()}-launches"
    board = waterfill_rs._native.Board.create(name, RANKS, EXPERTS, 7, REDUNDANT)
    board.unlink()
    maps, settings = maps_of(1), {"reason": "a test", "board": board, "cap_us": 99}
    device, member = torch.device("cpu"), Member(RANKS, EXPERTS, 0)
    made = []

    def make(group=None):
        settings["replicas"] = tables_of(maps.clone(), logical=maps)
        if group:
            made.append(DeviceGroupExchange(device, group, member, **settings))
        else:
            made.append(DeviceExchange(device, member, **settings, plans=True))
        return made[-1]

    yield make
    for exchange in made:
        exchange.close()


def test_on_a_device_one_launch_chooses_and_another_expands(launches):
    exchange = launches()
    ids, weights = torch.zeros(2, TOP_K, dtype=torch.int32), torch.ones(2, TOP_K)
    expanded, _ = exchange.expand(ids, weights, 0.4, layer=1)
    table, logical = exchange.replicas.on_device(1)
    choose, expand = exchange._expander.asked
    assert choose[1] is table and choose[2] is logical and choose[3:] == (False, 99, None)
    assert expand == ("expand", "quotas", None, None) and torch.equal(expanded, ids + 1)
    exchange._expander.asked.clear()
    assert torch.equal(exchange.move_up(ids, layer=7), ids + 1)
    (choose,) = exchange._expander.asked
    assert choose[1] is exchange.replicas.on_device(None)[0]
    assert choose[2:] == (None, True, 99, None)


def test_in_a_group_the_words_are_those_of_the_board_and_come_before(launches):
    exchange = launches(group="a group")
    ids, weights = torch.zeros(2, TOP_K, dtype=torch.int32), torch.ones(2, TOP_K)
    for moved in (False, True):
        if moved:
            exchange.move_up(ids, layer=1)
        else:
            exchange.expand(ids, weights, 0.4, layer=1)
        table, logical = exchange.replicas.on_device(1)
        count, choose, *expand = exchange._expander.asked
        assert count[0] == "count" and count[1] is table and count[2] is moved
        assert choose[1] is table and choose[2] is logical and choose[3:5] == (moved, 99)
        assert choose[5].shape == (RANKS * Launches.words,) and (choose[5] == 7).all()
        assert expand == ([] if moved else [("expand", "quotas", None, None)])
        exchange._expander.asked.clear()


@pytest.mark.parametrize("group", [None, "a group"])
def test_not_live_it_is_one_launch_of_the_primaries_and_nothing_else(launches, group):
    exchange = launches(group=group)
    ids = torch.zeros(2, TOP_K, dtype=torch.int32)
    for layer in (1, None, LAYERS):
        primaries, logical = exchange.replicas.primaries_on_device(layer)
        assert torch.equal(exchange.move_up(ids, layer=layer, live=False), ids + 2)
        (asked,) = exchange._expander.asked
        assert asked[0] == "move_up" and asked[1] is primaries and asked[2] is logical
        assert (primaries is None) == (logical is None) == (layer != 1)
        exchange._expander.asked.clear()
    exchange.replicas = None
    for live in (True, False):
        assert torch.equal(exchange.move_up(ids, layer=1, live=live), ids + 2)
        assert exchange._expander.asked == [("move_up", None, None)]
        exchange._expander.asked.clear()
