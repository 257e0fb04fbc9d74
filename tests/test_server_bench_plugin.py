"""What the plugin of ``benches/server`` does in the processes of an engine, with stand-ins for sglang's objects; no GPU."""

import inspect
import io
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


from server import model, modes, moving, plugin, redundant, schedule, traffic, weights
from server.control import CLOSED, MIXED, OPEN, PROFILED, ROWS, TIMED, Control
from server.engine import Rounds, serve
from server.forced import Forced, save
from server.gate import TURNS_AHEAD, Gate
from server.plugin import Bench
from server.protocol import Reader, send
from server.rank import Rank
from server.switch import STATIC_OFF, Switch


@pytest.fixture
def control(tmp_path):
    return Control(tmp_path / "control", create=True)


def test_the_gate_opens_in_the_same_turn_on_all_ranks(control, tmp_path):
    """Ranks' loops go in step, in any order within a turn, and requests come when they come."""
    numbers = random.Random(1)
    for _ in range(20):
        gates = [
            Gate(Control(tmp_path / "control"), lambda rank=rank: rank, 4) for rank in range(4)
        ]
        queues = [SimpleNamespace(waiting_queue=[], chunked_prefill_size=1) for _ in gates]
        control.list("queued")[:] = 0
        control.set(gate=CLOSED, requests=12, chunk=512)
        opened, complete = {}, None
        for turn in range(1, 60):
            for rank in numbers.sample(range(4), 4):
                queue = queues[rank].waiting_queue
                if len(queue) < 3 and numbers.random() < 0.3:
                    queue.append("request")
                seen = gates[rank].hook(lambda s: len(s.waiting_queue), queues[rank])
                if seen:
                    assert seen == 3 and opened.setdefault(rank, turn) <= turn
                assert len(queue) <= 3 and queues[rank].waiting_queue is queue
            if complete is None and all(len(q.waiting_queue) == 3 for q in queues):
                complete = turn
            if len(opened) == 4:
                break
        assert len(set(opened.values())) == 1
        assert complete < opened[0] <= complete + TURNS_AHEAD + 1
        assert all(queue.chunked_prefill_size == 512 for queue in queues)


class Event:
    now = 0.0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, later):
        return later.at - self.at


def set_round(control, **values):
    control.list("cycle")[:2] = [modes.MODES.index("home"), modes.MODES.index("live")]
    control.set(length=2, tokens=4, lead=1, base=10, placement=1, **values)


def run_forwards(rank, counts):
    seen = []

    def original(runner, batch):
        Event.now += 2.0
        if rank.balancers:
            rank.balancers[0].expand_topk(None, 1)
        ids = torch.full((len(batch.input_ids), 3), 9)
        seen.append((rank.mode, rank.forced.into(ids, 0).tolist()))

    for tokens in counts:
        rank.forward(original, None, SimpleNamespace(input_ids=torch.zeros(tokens)))
        Event.now += 1.0
    return seen


def a_rank(control, tmp_path):
    rank = Rank(
        control,
        tmp_path,
        event=Event,
        synchronize=lambda: None,
        memory=lambda: {"allocated": int(Event.now), "free": 1, "total": 2},
    )
    rank.number = 0
    tables = [np.arange(20, dtype=np.int16).reshape(1, 20, 1) + 100 * p for p in range(2)]
    save(tmp_path / "routing.npz", [[tables[0]], [tables[1]]])
    rank.forced = Forced.load(tmp_path / "routing.npz", 0, 2, 8, "cpu")
    return rank


def test_a_ranks_forwards_have_modes_and_tokens_in_turn(control, tmp_path):
    rank = a_rank(control, tmp_path)
    set_round(control, round=1, kind=TIMED)
    seen = run_forwards(rank, [4, 4, 4, 4, 2])
    assert [mode for mode, _ in seen] == ["home", "home", "live", "home", "live"]
    # Place 10 of 4 tokens begins at 40, which is 0 of 20; the table of placement 1; the router's other columns stay.
    assert seen[1][1] == seen[2][1] == [[100, 9, 9], [101, 9, 9], [102, 9, 9], [103, 9, 9]]
    assert seen[3][1][0] == [104, 9, 9] and len(seen[4][1]) == 2
    found = rank.results()
    assert found["forwards"][1:3] == [(1, "home", 10, 4, 2.0, 3.0), (2, "live", 10, 4, 2.0, 3.0)]
    assert found["forwards"][4] == (4, "live", 11, 2, 2.0, None)
    set_round(control, round=2, kind=TIMED, asked=2)
    run_forwards(rank, [4])
    rank.write_if_asked()
    assert control.list("written")[0] == 2
    assert len(json.loads((tmp_path / "round-2-0.json").read_text())["forwards"]) == 1
    with pytest.raises(ValueError, match="9 tokens, and routing is there for 8"):
        rank.forced.into(torch.zeros(9, 1), 0)


def test_experts_move_before_the_first_forward_of_a_round(control, tmp_path):
    rank, done = a_rank(control, tmp_path), []
    rank._move = lambda runner, location: done.append(f"moved to {location}")
    event = rank._event
    rank._event = lambda: done.append("event") or event()
    for number, location in ((1, 0), (2, 2), (3, 2), (4, 0)):
        set_round(control, round=number, kind=TIMED, location=location)
        run_forwards(rank, [4, 4])
        done.append("round")
    # Where they are already, nothing is moved. A move is in no forward's time, and before the lead.
    a_round = ["event"] * 4 + ["round"]
    assert done == [*a_round, "moved to 2", *a_round, *a_round, "moved to 0", *a_round]


def test_a_location_is_made_as_sglang_makes_it_at_start(tmp_path, monkeypatch):
    """With a stand-in for its module: each of its ways gets what this version takes."""
    calls, there = [], SimpleNamespace()

    class Metadata:
        @staticmethod
        def init_trivial(server_args, model_config, moe_ep_rank):
            return ("trivial", server_args, model_config, moe_ep_rank)

        @staticmethod
        def init_by_mapping(model_config, physical_to_logical_map, moe_ep_rank=None):
            return ("mapping", model_config, physical_to_logical_map, moe_ep_rank)

    def update(weights, made, **given):
        calls.append((weights, made, given))

    monkeypatch.setitem(
        sys.modules,
        "sglang.srt.eplb.expert_location",
        SimpleNamespace(
            ExpertLocationMetadata=Metadata, get_global_expert_location_metadata=lambda: there
        ),
    )
    weights_of = {2: "c", 1: "a"}
    runner = SimpleNamespace(
        server_args="args",
        model_config="config",
        model=SimpleNamespace(routed_experts_weights_of_layer=weights_of),
        expert_location_updater=SimpleNamespace(update=update),
    )
    asked = [[0, 1, 0, 2, 1, 0], [0, 1, 2, 2, 1, 0], [0, 2, 0, 1, 1, 2]]
    redundant.write(tmp_path / "map.json", asked[1:], 2)
    # Within a rank the order may be another; a dense layer has no experts to move.
    there.physical_to_logical_map = torch.tensor([[0] * 6, [2, 1, 0, 0, 1, 2], [0, 0, 2, 2, 1, 1]])
    for location in ("trivial", str(tmp_path / "map.json")):
        moving.move(runner, location, 1, 2)
    made = [[0, 1, 2, 0, 1, 2], *asked[1:]]
    assert [one for _, one, _ in calls] == [
        ("trivial", "args", "config", 1),
        ("mapping", "config", made, 1),
    ]
    given = {"update_layer_ids": [1, 2], "nnodes": 1, "rank": 1}
    assert all(layers is weights_of and of == given for layers, _, of in calls)
    there.physical_to_logical_map[2, 0] = 1
    with pytest.raises(RuntimeError, match=r"layer 2 has the map \[1, 0, 2, 2, 1, 1\], and was to"):
        moving.move(runner, str(tmp_path / "map.json"), 1, 2)
    moving.move(runner, "trivial", 1, 2)


def test_rows_and_calls_are_those_of_the_round(control, tmp_path):
    rank = a_rank(control, tmp_path)
    calls = {"calls": 100, "live": 90, "name": "board"}
    board = SimpleNamespace(
        snapshot=lambda: {"planner": {"mean": calls["calls"], "process": "p", "missed": [1]}}
    )

    class Balancer:
        num_routed_experts, world_size, layer_id = 4, 2, 7
        exchange = SimpleNamespace(board=board, tally=lambda: dict(calls))

        def expand_topk(self, topk_output, num_tokens):
            calls["calls"] += 1
            calls["live"] += 1
            return SimpleNamespace(topk_ids=torch.tensor([[0, 3, 5], [1, -1, 2]]))

    balancer = Balancer()
    rank.balancers = [balancer]
    set_round(control, round=1, kind=ROWS)
    run_forwards(rank, [4, 4])
    found = rank.results()
    # Slots 0 to 2 are of rank 0, 3 to 5 of rank 1, and each one's last is its shared slot.
    sent = [[1, 1], [1, 0]], [1, 1]
    assert found["rows"] == [(0, 7, *sent), (1, 7, *sent)]
    # The lead's call does not count.
    assert found["calls"] == {"calls": 1, "live": 1} and found["planner"] == {"mean": 1}
    set_round(control, round=2, kind=TIMED)
    run_forwards(rank, [4])
    assert "expand_topk" not in balancer.__dict__ and rank.results()["rows"] == []
    # A round that did not come to what counts has no calls, and not all that ever were.
    set_round(control, round=3, kind=PROFILED, asked=3)
    rank.write_if_asked()
    assert rank.results()["calls"] == {"calls": 0, "live": 0}


class Shared:
    """The package's choice, one for all layers of a model."""

    def __init__(self):
        self.forced, self.tally, self.seen = None, {"overlapped": 5, "fused": 0}, []
        self.overlaps = lambda batch: False


def test_a_switched_engine_forces_each_forward_and_a_shipped_one_none(control, tmp_path):
    rank, shared = a_rank(control, tmp_path), Shared()

    class Balancer:
        num_routed_experts, world_size, layer_id, exchange = 4, 2, 7, None
        overlap = SimpleNamespace(choice=shared)

        def expand_topk(self, topk_output, num_tokens):
            shared.seen.append(shared.forced)
            overlaps = shared.forced == "overlap"
            shared.tally["overlapped" if overlaps else "fused"] += 1
            # Rank 0 has slots 0 to 2, rank 1 has 3 to 5; no shared column where the expert is beside dispatch.
            ids = [[0, 3], [1, 4]] if overlaps else [[0, 3, 5], [1, -1, 2]]
            return SimpleNamespace(topk_ids=torch.tensor(ids))

    rank.balancers, rank.switches, rank.mode = [Balancer()], True, "home"
    rank.prepared()
    assert shared.forced == "fused"  # Before the first forward, and while graphs are captured.
    control.list("cycle")[:2] = [modes.MODES.index("home"), modes.MODES.index("overlap")]
    control.set(length=2, tokens=4, lead=1, round=1, kind=ROWS)
    run_forwards(rank, [4, 4, 4])
    assert shared.seen == ["fused", "fused", "overlap"]
    found = rank.results()
    # Of an overlapped batch the routed rows alone.
    sums = [np.sum(routed, 1) + shared for _, _, routed, shared in found["rows"]]
    assert np.array(sums).tolist() == [[3, 2], [3, 2], [2, 2]]
    # The lead is not among them, and what was before the round neither.
    assert found["batches"] == {"overlapped": 1, "fused": 1}
    assert found["modes"] == {"home": 1, "overlap": 1}
    assert (found["layers"], found["staying"]) == (1, 0)
    assert found["memory"]["prepared"]["allocated"] < found["memory"]["now"]["allocated"]
    # It is forced before the batch is run, once: a hook around the forward that is outside ours sees it.
    control.set(round=5, kind=TIMED, lead=0)
    control.list("cycle")[:2] = [modes.MODES.index("overlap"), modes.MODES.index("home")]
    rank.before_forward(None)
    assert shared.forced == "overlap"
    rank.before_forward(None)
    run_forwards(rank, [4, 4])
    assert shared.seen[3:] == ["overlap", "fused"]
    assert rank.results()["batches"] == {"overlapped": 1, "fused": 1}
    rank.switches, shared.forced = False, None
    control.set(round=2)
    run_forwards(rank, [4, 4, 4])
    assert shared.forced is None
    rank.switches = True
    rank.balancers.append(SimpleNamespace(overlap=None))
    with pytest.raises(RuntimeError, match="1 of 2 layers cannot overlap"):
        run_forwards(rank, [4, 4, 4])


def test_a_mixed_round_counts_kinds_and_has_tables_for_both(control, tmp_path):
    rank, seen = a_rank(control, tmp_path), []
    control.list("cycle")[0] = modes.MODES.index("auto")
    control.set(length=1, tokens=4, lead=0, base=0, placement=0, round=1, kind=MIXED)

    def forward(kind, beside):
        mode = SimpleNamespace(is_decode=lambda: kind == "decode", is_idle=lambda: kind == "idle")
        batch = SimpleNamespace(
            input_ids=torch.zeros(2), forward_mode=mode, is_extend_in_batch=beside
        )
        rank.forward(
            lambda *_: seen.append(int(rank.forced.into(torch.zeros(1, 1), 0))), None, batch
        )

    for kind, beside in (("prefill", True), ("decode", True), ("decode", False), ("idle", True)):
        forward(kind, beside)
    # Forward i begins at token 4 i: of table 0, and of table 1 where it decodes.
    assert seen == [0, 104, 108, 12]
    found = rank.results()
    assert found["kinds"] == {"prefill": 1, "decode": 2, "idle": 1, "beside a prefill": 2}
    assert found["modes"] == {"auto": 4} and found["forwards"] == []


def test_a_switched_balancer_does_what_the_mode_says():
    made = []

    class Theirs:
        def __init__(
            self, num_routed_experts, world_size, rank, layer_id, routed_scaling_factor=1.0
        ):
            self.static = os.environ[STATIC_OFF] == "0"
            self.shared_weight = 1 / routed_scaling_factor
            made.append((num_routed_experts, world_size, rank, layer_id, routed_scaling_factor))

        def expand_topk(self, topk_output, num_tokens):
            return "static" if self.static else "dynamic"

        def _expand_local_shared(self, topk_output):
            return "home"

    class Ours:
        num_routed_experts, world_size, rank, layer_id, shared_weight = 8, 2, 1, 3, 0.4
        exchange = "board"

        def expand_topk(self, topk_output, num_tokens, **options):
            return f"ours by {self.exchange}"

    ours, mode = Ours(), ["live"]
    switch = Switch(ours, Theirs, "routed_scaling_factor", lambda: mode[0], lambda balancer: "own")
    assert made == [(8, 2, 1, 3, 2.5)] * 2 and STATIC_OFF not in os.environ
    expected = {
        "live": "ours by board", "own": "ours by own", "home": "home", "sglang": "static", "sglang-dynamic": "dynamic",
    }  # fmt: skip
    for mode[0], does in expected.items():
        assert switch(None, 5, is_decode=True) == does
    assert ours.exchange == "board"
    mode[0] = "home"
    assert switch(None, 0) == "static"
    mode[0] = "overlap"
    assert switch(None, 5) == "ours by board"
    mode[0] = "auto"
    with pytest.raises(ValueError, match="mode 'auto'"):
        switch(None, 5)


def test_the_plugin_switches_what_is_ours_and_refuses_what_is_not(tmp_path):
    def told(mode, switches, upstream=False):
        Control(tmp_path / "control", create=True)
        folder = str(tmp_path)
        paths = {"control": str(tmp_path / "control"), "folder": folder}
        return {
            **paths,
            "ranks": 2,
            "experts": 4,
            "first_layer": 1,
            "mode": mode,
            "switches": switches,
            "upstream": upstream,
        }

    class Theirs(torch.nn.Module):
        def __init__(self, num_routed_experts, world_size, rank, layer_id, shared_weight):
            super().__init__()

        def _expand_local_shared(self, topk_output):
            return "home"

    def ours():
        balancer = SimpleNamespace(expand_topk=lambda output, n: "ours", exchange=None)
        for name in ("num_routed_experts", "world_size", "rank", "layer_id", "shared_weight"):
            setattr(balancer, name, 1)
        kind = type("Ours", (SimpleNamespace,), {"__module__": "waterfill_rs.sglang.balancer"})
        return kind(**vars(balancer))

    def model_with(balancer):
        router = torch.nn.Module()
        router.waterfill_balancer = balancer
        return torch.nn.ModuleList([torch.nn.Linear(1, 1), router])

    seams = SimpleNamespace(holder="waterfill_balancer", weight="shared_weight")

    def bench_of(*of):
        bench = Bench(told(*of), seams, Theirs)
        bench.rank._memory = lambda: {"allocated": 7}
        return bench

    bench, balancer = bench_of("home", True), ours()
    bench.prepared(None, model=model_with(balancer))
    assert balancer.expand_topk(None, 3) == "home"
    assert bench.rank.results()["memory"]["prepared"] == {"allocated": 7}
    bench, balancer = bench_of("auto", False), ours()
    bench.prepared(None, SimpleNamespace(model=model_with(balancer)))
    assert balancer.expand_topk(None, 3) == "ours" and bench.rank.balancers == [balancer]
    bench.prepared(None, model=model_with(None))
    with pytest.raises(SystemExit, match="1 layers' balancers are not of waterfill-rs"):
        bench.prepared(None, model=model_with(SimpleNamespace()))
    bench, theirs = bench_of("sglang", False, True), SimpleNamespace(layer_id=1)
    bench.prepared(None, model=model_with(theirs))
    assert bench.rank.balancers == [theirs] and bench.rank.results()["calls"] == {}
    with pytest.raises(SystemExit, match="1 layers' balancers are not sglang's own"):
        bench.prepared(None, model=model_with(balancer))


def test_the_bench_looks_at_a_model_once_the_package_has_prepared_it(tmp_path, monkeypatch):
    """sglang's hooks of one target wrap each other in the order in which they are registered."""
    entered = []
    kinds = SimpleNamespace(REPLACE="replace", AFTER="after", AROUND="around", BEFORE="before")
    registry = SimpleNamespace(register=lambda target, hook, kind: entered.append(target))
    hooks = SimpleNamespace(HookRegistry=registry, HookType=kinds)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
    monkeypatch.setattr("waterfill_rs.sglang.register", lambda: entered.append("the package"))
    seams = SimpleNamespace(prepare="a.prepare", balancer="collections.OrderedDict")
    monkeypatch.setattr("waterfill_rs.sglang.compat.find", lambda: (seams, []))
    plugin.register()
    assert entered == []  # No engine of the bench.
    Control(tmp_path / "control", create=True)
    paths = {"control": str(tmp_path / "control"), "folder": str(tmp_path)}
    told = {**paths, "ranks": 1, "experts": 4, "mode": "auto", "switches": False}
    (tmp_path / "told.json").write_text(json.dumps(told))
    monkeypatch.setenv(plugin.VARIABLE, str(tmp_path / "told.json"))
    plugin.register()
    assert entered[0] == "the package" and "a.prepare" in entered


def test_an_engine_runs_rounds_and_tells_failures(control, tmp_path):
    generated = []

    def generate(prompts, new):
        generated.append(
            (len(prompts), len(prompts[0]), new, control.get("requests"), control.get("length"))
        )
        if new == 99:
            raise OverflowError("too many")

    def ranks():
        while not done.wait(0.002):
            for rank in range(2):
                number = control.get("asked")
                if number and control.list("written")[rank] != number:
                    (tmp_path / f"round-{number}-{rank}.json").write_text(
                        json.dumps({"rank": rank})
                    )
                    control.list("written")[rank] = number

    done = threading.Event()
    thread = threading.Thread(target=ranks)
    thread.start()
    commands, asks = os.pipe()
    replies, says = os.pipe()

    class Traffic:
        def send(self, sent, window, deadline):
            assert control.get("gate") == OPEN and control.get("chunk") == 2048
            generated.append((sent, window, deadline))
            return 1.5, 30, 4

    class Answers:
        def ask(self, prompts, new):
            assert control.get("gate") == CLOSED and control.get("tokens") == 3 * 96
            generated.append(([[len(prompt) for prompt in own] for own in prompts], new))
            return ["answers"]

    rounds = Rounds(generate, Traffic(), Answers(), control, tmp_path, 2, 100, written_s=5)
    off = modes.Plan("off", ("off",))
    asked = schedule.message(schedule.Cell("prefill", 128, 0, "trivial"), off, 2, 3, 0, short=True)
    send(asks, asked)
    one = traffic.Request(0.5, 1, 30, 4)
    mixed = schedule.Cell("mixed", 2048, 0, "trivial")
    send(asks, schedule.mixed_message(mixed, off, [one], 6, 0, 2.0, 9.0))
    send(asks, schedule.answers_message(mixed, off, "off", 3, 2, 7))
    send(asks, {**asked, "round": 4, "new": 99})
    serve(Reader(commands), says, rounds)
    reader = Reader(replies)
    reply = reader.next(1)
    assert reply["round"] == 3 and reply["ranks"] == [{"rank": 0}, {"rank": 1}]
    assert generated[0] == (4, 128, 1, 4, 1) and control.get("gate") == CLOSED
    reply = reader.next(1)
    assert (reply["seconds"], reply["prompt_tokens"], reply["new_tokens"]) == (1.5, 30, 4)
    assert generated[1] == ([one], 2.0, 9.0)
    assert reader.next(1)["answers"] == ["answers"]
    assert generated[2] == ([[96] * 3] * 2, 24)
    assert reader.next(1) == {"failed": "round 4: OverflowError('too many')"}
    done.set()
    thread.join()
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] wrote no results of round 5"):
        late = Rounds(generate, None, None, control, tmp_path, 2, 100, written_s=0.05)
        late.run({**asked, "round": 5})
    assert time.monotonic() - begin < 5
    os.close(asks)
    serve(Reader(commands), says, rounds)  # No more commands: it ends.


def test_the_hooks_fit_the_installed_sglang(tmp_path):
    """Each target is there, is applied, and takes what the hook takes; each argument is one of ``ServerArgs``."""
    sglang = pytest.importorskip("sglang")
    import subprocess

    from msgspec import structs
    from server import workspace
    from sglang.srt.server_args import ServerArgs

    known = {field.name for field in structs.fields(ServerArgs)}
    for needs in ({"prefill": [64]}, {"prefill": [64], "decode": [8], "mixed": [2048]}):
        assert set(model.arguments(needs, 2, "m", True)) <= known
    plan = modes.Plan("it", ("off-static",), placed=modes.Placed(("p",), 16, "static", 9))
    assert (
        set(redundant.arguments(plan, {("p", 16): redundant.Files(Path("p"), Path("p"))})) <= known
    )
    # A rank's weights are by the logical experts of its slots.
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata as Metadata
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    plugin._map_of_experts()
    assert "physical_to_logical_map" in inspect.signature(Metadata).parameters
    named = FusedMoE.__init__.__code__.co_names
    assert {weights.FUSED, "layer_id", "moe_ep_rank", "moe_ep_size"} <= set(named)
    # One can be told which rank a request is for, and asked for logprobs.
    assert {traffic.rank_argument(sglang.Engine), "return_logprob"} <= set(
        inspect.signature(sglang.Engine.async_generate).parameters
    )
    # Experts move as sglang's EPLB moves them.
    from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater

    given = {"routed_experts_weights_of_layer", "new_expert_location_metadata"}
    given |= {"update_layer_ids", "nnodes", "rank"}
    assert given <= set(inspect.signature(ExpertLocationUpdater.update).parameters)
    from sglang.srt.model_executor.model_runner import ModelRunner

    assert "self.expert_location_updater = " in inspect.getsource(ModelRunner)
    assert "physical_to_logical_map" in inspect.signature(Metadata.init_by_mapping).parameters
    space = workspace.Workspace(tmp_path)
    (plan,) = modes.engines("prefill", ["live", "home"])
    routing = {"routing": "r", "placements": 1, "longest": 8, "experts": 8}
    told = space.told("e", plan, {"tp_size": 2}, routing)
    program = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry as H\n"
        "print('applied', *sorted(t for t, hooks in H._hooks.items() if t in H._patched and "
        "any(getattr(h, '__module__', '').startswith('server.') for _, h, *_ in hooks)))"
    )
    root = Path(__file__).parents[1]
    given = {**os.environ, "PYTHONPATH": str(root / "python")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=space.environment(plan, told, given, 0),
        capture_output=True,
        text=True,
    )
    applied = next(line for line in io.StringIO(done.stdout) if line.startswith("applied"))
    assert len(applied.split()) == 8, done.stderr[-2000:]
