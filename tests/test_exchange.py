"""Exchanges of counts: chosen alike on all ranks, equal to the plan from all counts, seen from outside."""

import json
import os
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
import torch.distributed as dist

import waterfill_rs
from waterfill_rs import CostModel, _native
from waterfill_rs.cli import main
from waterfill_rs.exchange import boards, rendezvous
from waterfill_rs.exchange.host import BoardExchange, SoloExchange
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.settings import BoardSettings
from waterfill_rs.torch import count

EXPERTS, TOP_K = 24, 3
PATIENT = BoardSettings(cap_us=10_000_000)


def ids_of(rank, call):
    """Top-k ids of one call; some ranks are idle now and then, some rows are padding."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    rows = 0 if (call + rank) % 5 == 0 else int(torch.randint(1, 40, (), generator=generator))
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].int().contiguous()
    if rows > 2:
        ids[1] = -1
    return ids


def expected(ranks, call):
    """Each rank's quotas by the plan from all counts."""
    counted = [count(ids_of(r, call), physical_experts=EXPERTS, ranks=ranks) for r in range(ranks)]
    plan = waterfill_rs.plan(
        [sum(column) for column in zip(*(counts for counts, _, _ in counted), strict=True)],
        [tokens for _, _, tokens in counted],
        ranks=ranks,
        visits=[visits for _, visits, _ in counted],
    )
    return [plan.quotas_of(rank) for rank in range(ranks)]


def quotas(exchange, ids):
    """How many shared rows one call sends to each rank."""
    shared = exchange.expand(ids, torch.ones(ids.shape), 1.0)[0][:, -1]
    ranks, experts = exchange.member.ranks, exchange.member.experts
    slots = experts // ranks + 1
    return torch.bincount(shared[shared >= 0] // slots, minlength=ranks).tolist()


def call(port, ids, top_k, cap_us=10_000_000):
    """How one call of a native end with these ids, an array, ends."""
    rows = len(ids) // top_k
    arrays = ids, array("f", ids), array("i", ids * 2), array("f", ids * 2)
    at_ids, at_weights, *out = (each.buffer_info()[0] for each in arrays)
    return port.unsafe_expand_ptr(
        (at_ids, rows, top_k, 32), (at_weights, 32), tuple(out), 1.0, cap_us
    )


def on_ranks(ranks, run):
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


def segments():
    """This process's: other tests run beside these."""
    return sorted(path.name for path in Path("/dev/shm").glob(f"waterfill-rs-{os.getpid()}-*"))


@pytest.mark.parametrize("pace", ["inline", "park", "spin"])
def test_ranks_of_one_host_meet_at_a_board_and_get_the_plan_of_all(pace):
    before = segments()

    def run(rank, store):
        settings = BoardSettings(cap_us=PATIENT.cap_us, pace=pace)
        exchange = open_exchange(store, Member(3, EXPERTS, rank), settings=settings)
        found = [quotas(exchange, ids_of(rank, call)) for call in range(200)]
        exchange.close()
        return exchange, found

    found = on_ranks(3, run)
    assert segments() == before
    for rank, (exchange, of_rank) in enumerate(found):
        assert exchange.name == "board" and "one host" in exchange.reason
        assert of_rank == [expected(3, call)[rank] for call in range(200)]
        assert exchange.tally()["live"] == exchange.tally()["calls"] == 200


@pytest.mark.parametrize(
    "field, argument, values, words",
    [
        ("experts", "experts", (24, 48), ("24", "48")),
        ("choice", "choice", ("board", "auto"), ("board", "auto")),
        ("ranks", "ranks", (2, 3), ("2", "3")),
        ("timeout_us", "settings", (BoardSettings(7), BoardSettings(9)), ("7", "9")),
        (
            "cost_model",
            "cost_model",
            (CostModel.rows(), CostModel.roofline(20.0, 0.1, 64)),
            ("Rows", "tile: 64"),
        ),
    ],
)
def test_ranks_that_disagree_all_refuse_with_both_values(field, argument, values, words):
    def run(rank, store):
        wanted = {"ranks": 2, "experts": EXPERTS, "choice": "auto", argument: values[rank]}
        member = Member(wanted.pop("ranks"), wanted.pop("experts"), rank)
        return open_exchange(store, member, **wanted)

    for one in on_ranks(2, run):
        assert isinstance(one, ValueError), one
        assert f"{field} is" in str(one) and all(word in str(one) for word in words), one
        assert "on rank 0" in str(one) and "on rank 1" in str(one)


def test_a_rank_of_another_version_is_named_whatever_its_card_holds():
    store = dist.HashStore()
    store.set("card/1", json.dumps({"version": "9.9", "ranks": 2, "a field of 9.9": 0}))
    with pytest.raises(
        ValueError, match=f"version is 9.9 on rank 1 and {waterfill_rs.__version__}"
    ):
        open_exchange(store, Member(2, 24, 0))


@pytest.mark.parametrize("field", ["_boot", "_device"])
def test_ranks_that_are_apart_do_not_try_a_board(field, monkeypatch):
    names = iter(["1", "2", "3", "4"])
    lock = threading.Lock()

    def another():
        with lock:
            return next(names)

    monkeypatch.setattr(rendezvous, field, another)
    found = on_ranks(2, lambda rank, store: open_exchange(store, Member(2, 24, rank)))
    for exchange in found:
        assert exchange.name == "solo" and "rank 0 and" in exchange.reason
    found = on_ranks(
        2, lambda rank, store: open_exchange(store, Member(2, 24, rank), choice="board")
    )
    for error in found:
        assert "the board was asked for and cannot be had" in str(error)


def test_a_board_that_one_rank_cannot_have_is_nobodys(monkeypatch):
    before = segments()
    attach = _native.Board.attach

    class Refusing:
        create = _native.Board.create

        @staticmethod
        def attach(name, ranks, experts, run, redundant):
            return attach(name, ranks, experts, run ^ 1, redundant)

    monkeypatch.setattr(rendezvous._native, "Board", Refusing)
    found = on_ranks(2, lambda rank, store: open_exchange(store, Member(2, 24, rank)))
    for exchange in found:
        assert exchange.name == "solo"
        assert "rank 1" in exchange.reason and "run token, low" in exchange.reason
    assert segments() == before


def test_a_store_that_is_lost_while_the_board_is_made_leaves_no_name():
    class Lost(dist.Store):
        def __init__(self):
            super().__init__()
            self.held = dist.HashStore()

        def set(self, key, value):
            if key == "board":
                raise dist.DistNetworkError("connection reset")
            for rank in "01":  # The other one is where this is, and alike.
                self.held.set(f"card/{rank}", value)

        def get(self, key):
            return self.held.get(key)

    before = segments()
    store = Lost()
    with pytest.raises(dist.DistNetworkError, match="connection reset"):
        open_exchange(store, Member(2, 24, 0))
    assert segments() == before


def test_a_group_on_devices_that_one_rank_has_no_board_for_is_nobodys(monkeypatch):
    names, lock = iter("12345678"), threading.Lock()
    create = _native.Board.create

    def another():
        with lock:
            return next(names)

    class Once:
        @staticmethod
        def create(*arguments):
            with lock:
                if getattr(Once, "made", False):
                    raise OSError("No space left on device")
                Once.made = True
            return create(*arguments)

    monkeypatch.setattr(rendezvous, "_boot", another)
    monkeypatch.setattr(rendezvous, "_check_group", lambda group, ranks: None)

    def run(choice):
        monkeypatch.setattr(rendezvous._native, "Board", type("Board", (Once,), {}))
        Once.made = False
        where = {"device": torch.device("cuda", 0), "group": object(), "choice": choice}
        return on_ranks(2, lambda r, s: open_exchange(s, Member(2, 24, r), **where))

    before = segments()
    for exchange in run("auto"):
        assert exchange.name == "solo" and "No space left" in exchange.reason, exchange
    for error in run("group"):
        assert "the group was asked for and cannot be had: rank" in str(error)
    assert segments() == before


def test_a_board_tells_how_many_words_a_rank_posts():
    """Tokens, visits, counts; or tokens, visits, loads, rows of 32 jobs, bits of 288 experts, a fingerprint."""
    for experts, redundant, words in [(256, 0, 261), (4, 0, 9), (288, 32, 51)]:
        board = _native.Board.create(boards.board_name(), 4, experts, 1, redundant)
        board.unlink()
        assert board.words == words


def test_a_lone_rank_and_a_choice_need_no_peer():
    lone = open_exchange(dist.HashStore(), Member(1, 24, 0))
    assert isinstance(lone, SoloExchange) and lone.reason == "there is one rank"
    with pytest.raises(ValueError, match="exchange 'bord': give one of auto, solo, board, group"):
        open_exchange(dist.HashStore(), Member(1, 24, 0), choice="bord")


def test_a_forked_child_cannot_be_the_rank():
    board = _native.Board.create(f"waterfill-rs-test-{os.getpid()}", 1, 4, 7)
    board.unlink()
    exchange = BoardExchange(
        board,
        Member(1, 4, 0),
        CostModel.rows(),
        cap_us=1_000_000,
        patience_us=1000,
        pace="park",
        reason="a test",
    )
    ids = torch.zeros(1, 1, dtype=torch.int32)
    assert quotas(exchange, ids) == [1]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            quotas(exchange, ids)
            os.write(writer, b"went on")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert f"is a fork of {os.getpid()}" in os.read(reader, 1000).decode()
    assert quotas(exchange, ids) == [1]
    exchange.close()


def test_ids_that_are_no_experts_post_nothing():
    def run(rank, store):
        exchange = open_exchange(store, Member(2, EXPERTS, rank), settings=PATIENT)
        bad = torch.full((2, TOP_K), EXPERTS, dtype=torch.int32)
        with pytest.raises(ValueError, match="expert id 24 in row 0"):
            quotas(exchange, bad)
        return quotas(exchange, ids_of(rank, 1))

    assert on_ranks(2, run) == expected(2, 1)


def test_a_process_group_of_other_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="the process group has 2 ranks: give one of 9"):
        open_exchange(dist.HashStore(), Member(9, 9, 0), group=object())


def test_layers_on_the_cpu_of_several_hosts_take_own_counts(monkeypatch):
    names, lock = iter("12345678"), threading.Lock()

    def another():
        with lock:
            return next(names)

    monkeypatch.setattr(rendezvous, "_boot", another)
    monkeypatch.setattr(rendezvous, "_check_group", lambda group, ranks: None)

    def run(choice):
        where = {"group": object(), "choice": choice}
        return on_ranks(2, lambda r, s: open_exchange(s, Member(2, 24, r), **where))

    for exchange in run("auto"):
        assert isinstance(exchange, SoloExchange) and "host (boot id) is" in exchange.reason
    for error in run("group"):
        assert isinstance(error, ValueError), error
        assert "cannot be had: layers are on the CPU" in str(error)


def test_status_and_top_see_a_board_from_outside(capsys, monkeypatch):
    with monkeypatch.context() as nowhere:
        nowhere.setattr(boards, "find", list)
        assert main(["status"]) == 1
    assert "no board found" in capsys.readouterr().err
    name = f"waterfill-rs-{os.getpid()}-seen"
    board = _native.Board.create(name, 2, 4, 7)
    board.unlink()
    ports = [_native.Port(board, 0, CostModel.rows(), plans_patience_us=1)]
    ports.append(_native.Port(board, 1, CostModel.rows()))
    ids = array("i", [0, 1, 1])
    # Rank 1 lives, and its counts do not come.
    assert call(ports[0], ids, 1) == "none"
    assert main(["status", "--json"]) == 0
    (seen,) = (one for one in json.loads(capsys.readouterr().out) if one["name"] == name)
    assert (seen["version"], seen["name"]) == (_native.SNAPSHOT_VERSION, name)
    assert (seen["planner"]["late"], seen["planner"]["missed"]) == (1, [0, 1])
    assert [rank["alive"] for rank in seen["by_rank"]] == [True, True] and seen["planner"]["alive"]
    assert seen["by_rank"][0]["none"] == 1
    assert seen["by_rank"][0]["tokens"] == 3
    (found,) = (board for board in boards.find() if board.name == name)
    assert seen == json.loads(json.dumps(found.snapshot()))
    assert main(["status"]) == 0
    told = capsys.readouterr().out
    assert f"board {name}: 2 ranks" in told and "no plan: 1 a rank was late" in told
    assert any(
        line.split()[1:5] == [str(os.getpid()), "alive", "0", "0.00%"] for line in told.splitlines()
    )
    assert ["-", "-", "-"] in [line.split()[-3:] for line in told.splitlines()], (
        "rank 1 never waited"
    )
    assert main(["top", "--count", "2", "--interval", "0.01"]) == 0
    assert "live/s" in capsys.readouterr().out
    del ports[1]
    assert call(ports[0], ids, 1) == "live", "a gone rank is left out"
    seen = board.snapshot()
    assert [rank["alive"] for rank in seen["by_rank"]] == [True, False]
    assert seen["planner"]["partial"] == 1
    for interval in ("0", "nan", "inf"):
        assert main(["top", "--count", "2", "--interval", interval]) == 2


def test_top_gives_rates_over_the_time_that_passed(capsys, monkeypatch):
    name = f"waterfill-rs-{os.getpid()}-rates"
    board = _native.Board.create(name, 1, 4, 7)
    board.unlink()
    port = _native.Port(board, 0, CostModel.rows(), plans_patience_us=1)
    ids = array("i", [0])
    find, now = boards.find, [0.0]

    def slowly():
        now[0] += 10.0
        for _ in range(100):
            call(port, ids, 1)
        return [board for board in find() if board.name == name]

    monkeypatch.setattr(boards, "find", slowly)
    monkeypatch.setattr("waterfill_rs.operate.status.time.monotonic", lambda: now[0])
    assert main(["top", "--count", "2", "--interval", "0.01"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[3] == "10"


def test_an_observer_refuses_what_is_no_board(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="mode is"):
        _native.Observer(file)
    file.chmod(0o600)
    with pytest.raises(ValueError, match="magic and version"):
        _native.Observer(file)
    with pytest.raises(OSError, match="opening the segment failed"):
        _native.Observer(tmp_path / "absent")


MEET = """
import sys, datetime, torch.distributed as dist
from waterfill_rs.exchange.member import Member
from waterfill_rs.exchange.rendezvous import open_exchange
from waterfill_rs.exchange.settings import BoardSettings
rank, folder = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(folder + "/store", 2)
store.set_timeout(datetime.timedelta(seconds=60))
settings = BoardSettings(cap_us=10_000_000)
exchange = open_exchange(store, Member(2, 4, rank), settings=settings)
print(exchange.name, exchange.reason)
"""


@pytest.mark.parametrize(
    "namespace, name, reason",
    [
        ("mount -t tmpfs none /dev/shm;", "solo", "/dev/shm (device) is"),
        ("true;", "board", "one host"),
    ],
)
@pytest.mark.parametrize("flags", ["-m", "-mi", "-mpf"])
def test_containers_meet_at_a_board_only_if_they_share_dev_shm(
    namespace, name, reason, flags, tmp_path
):
    own = ["unshare", flags, "sh", "-c", f'{namespace} exec "$@"', "sh"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here")
    rank = [sys.executable, "-c", MEET]
    started = [
        subprocess.Popen([*prefix, *rank, str(i), tmp_path], stdout=subprocess.PIPE, text=True)
        for i, prefix in enumerate(([], own))
    ]
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert said.startswith(name) and reason in said


WAIT = """
import sys, time
from array import array
from waterfill_rs import CostModel, _native
from waterfill_rs.exchange.ends import BoardEnd
from waterfill_rs.exchange.member import Member
rank, name = int(sys.argv[1]), sys.argv[2]
board = _native.Board.attach(name, 2, 4, 7)
end = BoardEnd(
    board, Member(2, 4, rank), CostModel.rows(), cap_us=10_000_000, patience_us=9_000_000, pace="park", reason="a test"
)
print(end.unwatched, flush=True)
ids = array("i", [0, 1])
while sys.stdin.readline():
    end.expand_array(ids, 1)
    print(end.tally()["live"], flush=True)
"""


def test_who_lives_is_right_across_pid_namespaces():
    own = ["unshare", "-pf", "--mount-proc"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here")
    name = f"waterfill-rs-{os.getpid()}-namespaces"
    board = _native.Board.create(name, 2, 4, 7)
    # Each rank is in a namespace of its own, as containers are: every process id here is a small number of some process's.
    ranks = [
        subprocess.Popen(
            [*own, "--kill-child", sys.executable, "-c", WAIT, str(rank), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    def call(*which):
        for rank in which:
            ranks[rank].stdin.write("\n")
            ranks[rank].stdin.flush()
        return [ranks[rank].stdout.readline() for rank in which]

    def alive():
        (seen,) = (found.snapshot() for found in boards.find() if found.name == name)
        assert seen["by_rank"][0]["process"] < 10, "its id there"
        return [rank["alive"] for rank in seen["by_rank"]], seen["planner"]["alive"]

    try:
        assert [rank.stdout.readline() for rank in ranks] == ["None\n"] * 2
        assert call(0, 1) == ["1\n"] * 2
        assert alive() == ([True, True], True)
        ranks[1].kill()
        ranks[1].wait()
        deadline = time.monotonic() + 10
        while alive()[0][1] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive() == ([True, False], True)
        begun = time.monotonic()
        assert call(0) == ["2\n"], "live without the gone rank"
        assert time.monotonic() - begun < 5, "nobody waits for it"
    finally:
        board.unlink()
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_rank_that_cannot_be_watched_says_so(monkeypatch, caplog):
    held = []

    def run(rank, store):
        return open_exchange(store, Member(2, 24, rank), settings=PATIENT)

    create = _native.Board.create

    class Taken:
        """A board at whose rank 1 another process seems to be already."""

        attach = _native.Board.attach

        @staticmethod
        def create(*arguments):
            board = create(*arguments)
            held.append(_native.DeviceEnd(board, 1, True))
            return board

    monkeypatch.setattr(rendezvous._native, "Board", Taken)
    found = on_ranks(2, run)
    assert [exchange.name for exchange in found] == ["board"] * 2
    assert found[0].unwatched is None and "which another process has" in found[1].unwatched
    (told,) = (record.getMessage() for record in caplog.records)
    assert "rank 1 cannot be watched" in told and "wait up to 10 s for it twice" in told
