"""The figures of a GPU: what they say of a layer, their file, and the built-in table."""

import json
import subprocess
import sys

import pytest

from waterfill_rs import CostModel
from waterfill_rs.machine import Machine, machine_of, parse
from waterfill_rs.machines import MACHINES
from waterfill_rs.replay import cost_models

GIVEN = {
    "name": "NVIDIA H200",
    "source": "a test",
    "shape": [4096, 1024],
    "expert_us": [[128, 30.0], [256, 40.0], [512, 60.0]],
    "active_expert_us": 12.0,
    "dense_us": [[64, 20.0], [1024, 100.0]],
    "dispatch_us": [[64, 40.0], [1064, 140.0]],
    "dispatch_ranks": 4,
    "dispatch_top_k": 8,
    "launch_us": 5.5,
    "prefill_us": [[1024, 1200, 1000.5], [4096, 3000, 3000], [8192, 5300, 6000]],
}


def machine(**changes):
    return Machine(**{**GIVEN, **changes})


def test_dense_times_lie_on_lines_through_the_points():
    measured = machine()
    times = [measured.dense(tokens, 4096, 1024) for tokens in (0, 1, 64, 544, 1024, 1984)]
    assert times == [0, 20, 20, 60, 100, 180]


def test_times_go_with_the_multiply_adds_of_the_shape():
    measured = machine()
    assert measured.dense(1024, 8192, 512) == measured.dense(1024, 4096, 1024)
    assert measured.dense(1024, 4096, 2048) == 2 * measured.dense(1024, 4096, 1024)
    assert measured.grouped([300], 2048, 1024) == measured.grouped([300], 4096, 1024) / 2


def test_a_grouped_call_is_its_own_time_and_each_active_expert_s():
    measured = machine()
    assert measured.call_us == 18
    assert measured.grouped([], 4096, 1024) == measured.grouped([0, 0], 4096, 1024) == 0
    assert measured.grouped([1], 4096, 1024) == measured.grouped([128, 0], 4096, 1024) == 30
    assert measured.grouped([128, 0, 5], 4096, 1024) == 18 + 12 + 12
    assert measured.grouped([256, 384, 1024], 4096, 1024) == 18 + 22 + 32 + 82


def test_dispatch_grows_with_bytes_and_ranks_that_a_token_goes_to():
    measured = machine()
    assert measured.dispatch(0) == 0
    assert measured.dispatch(564) == measured.dispatch(564, 4096, 8, 4) == 90
    assert measured.dispatch(564, hidden=2048) == 65
    copies = {(r, k): r * (1 - (1 - 1 / r) ** k) for r, k in ((4, 8), (8, 8), (8, 2))}
    for ranks, top_k in ((8, 8), (8, 2)):
        expected = 40 + 50 * copies[ranks, top_k] / copies[4, 8]
        assert measured.dispatch(564, top_k=top_k, ranks=ranks) == pytest.approx(expected)
    assert measured.dispatch(564, ranks=1) == pytest.approx(40 + 50 / copies[4, 8])
    unknown = machine(dispatch_us=[], dispatch_ranks=None, dispatch_top_k=None, prefill_us=[])
    assert unknown.dispatch(564) is None


def test_prefill_overlaps_where_that_was_measured_to_be_faster():
    measured = machine()
    answers = [measured.prefill_overlaps(tokens, 4) for tokens in (0, 1024, 8191, 8192, 10**6)]
    assert answers == [False, False, False, True, True]
    assert measured.prefill_overlaps(8192, 2) is True
    assert measured.prefill_overlaps(8192, 5) is None
    assert machine(prefill_us=[]).prefill_overlaps(8192, 4) is None


def test_prefill_overlaps_only_where_it_is_faster_by_far():
    def answer(overlapped, fused=1000.0):
        return machine(prefill_us=[[512, overlapped, fused]]).prefill_overlaps(1, 2)

    assert [answer(us) for us in (800.0, 899.0, 901.0, 1000.0)] == [True, True, False, False]
    # Two H100, 1,024 to 8,192 tokens a rank: their server was slower overlapped, or as fast.
    measured = [(2252.6, 1515.7), (2587.6, 2707.3), (4374.6, 4431.5)]
    assert not any(answer(*times) for times in measured)
    for arguments in ((-1, 4), (1, 0)):
        with pytest.raises(ValueError, match="give at least 0 and 1"):
            machine().prefill_overlaps(*arguments)


def test_prefill_without_dispatch_is_refused():
    nowhere = {"dispatch_us": [], "dispatch_ranks": None, "dispatch_top_k": None}
    with pytest.raises(ValueError, match=r"prefill_us is .*: give none of them"):
        machine(**nowhere)
    assert machine(**nowhere, prefill_us=[]).prefill_us == ()


def test_the_cost_table_is_a_staircase_without_the_call_s_time():
    assert machine().cost_table() == [(128, 12), (256, 22), (384, 32), (512, 42)]
    odd = machine(expert_us=[[8, 30.0], [200, 126.0]])
    assert odd.cost_table() == [(8, 12), (128, 72), (200, 108)]
    model = CostModel.table(odd.cost_table())
    assert [model.cost(rows) for rows in (0, 1, 8, 9, 200)] == [0, 12e6, 12e6, 72e6, 108e6]


def test_a_file_holds_the_machine(tmp_path):
    path = tmp_path / "gpu.json"
    machine().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]
    assert Machine.load(path) == machine()
    assert json.loads(path.read_text())["version"] == 1
    later = ("launch_us", "prefill_us")
    old = parse({"version": 1, **{k: v for k, v in GIVEN.items() if k not in later}})
    assert (old.launch_us, old.prefill_us) == (None, ())


WRONG = {
    "name": ("", 5),
    "source": (None,),
    "shape": ([4096], [4096, 0], [4096, 2.5], [True, 1], "4096"),
    "active_expert_us": (0, -1, "12", None, True, float("nan"), 30.1),
    "expert_us": ([], None, [[128]], [128], [["128", 1.0]], [[0, 1.0]], [[1.5, 1.0]], [[128, 0]]),
    "dense_us": ([], [[64, 1.0], [64, 2.0]], [[64, 2.0], [128, 1.0]], [[64, float("inf")]]),
    "dispatch_us": ([], None, [[64, "1"]]),
    "dispatch_ranks": (1, None, 2.5),
    "dispatch_top_k": (0, None, "8"),
    "launch_us": (0, "5", float("nan")),
    "prefill_us": (
        None,
        [1024],
        [[1024, 1.0]],
        [[1024, 1.0, 2.0, 3.0]],
        [[0, 1.0, 2.0]],
        [[1024.5, 1.0, 2.0]],
        [[1024, 0, 2.0]],
        [[1024, 1.0, float("nan")]],
        [[1024, 1.0, "2"]],
        [[1024, 1.0, 2.0], [1024, 1.0, 2.0]],
    ),
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG.items() for v in values]
)
def test_an_error_names_file_field_value_and_what_to_give(tmp_path, field, value):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"version": 1, **GIVEN, field: value}))
    with pytest.raises(ValueError, match="give ") as raised:
        Machine.load(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    # A dispatch without points makes its ranks the wrong ones.
    assert field in text or (field, value) == ("dispatch_us", [])


def test_a_file_that_is_no_machine_is_refused(tmp_path):
    path = tmp_path / "gpu.json"
    cases = {
        "nothing": "Expecting value",
        "[1]": "it holds a list",
        "[" * 100000: "recursion",
        json.dumps(GIVEN): "version is None: give 1",
        json.dumps({"version": 2, **GIVEN}): "version is 2: give 1",
        json.dumps({"version": True, **GIVEN}): "version is True: give 1",
        json.dumps({"version": 1, **GIVEN, "speed": 1}): "there is no field 'speed'",
        json.dumps({"version": 1, "name": "x"}): "source is missing",
    }
    for text, expected in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match="calibrate --json writes one") as raised:
            Machine.load(path)
        assert str(raised.value).startswith(f"{path}: ") and expected in str(raised.value)
    with pytest.raises(OSError, match="absent"):
        Machine.load(tmp_path / "absent")


def test_negative_rows_and_shapes_are_refused():
    for call in (
        lambda: machine().dense(-1, 4096, 1024),
        lambda: machine().grouped([-1], 4096, 1024),
        lambda: machine().dense(1, 0, 1024),
        lambda: machine().dense(1, 4096, 1.5),
    ):
        with pytest.raises(ValueError, match="give"):
            call()


@pytest.mark.parametrize("short", MACHINES)
def test_the_built_in_machines_are_whole(short):
    known = MACHINES[short]
    assert (
        machine_of(short.lower())
        is machine_of(known.name)
        is machine_of(f"NVIDIA {short}")
        is known
    )
    assert parse(json.loads(known.to_json())) == known
    assert known.source
    table = CostModel.table(known.cost_table())
    assert table.cost(8192) > table.cost(1024) > table.cost(1) > 0
    hidden, intermediate = known.shape
    many = known.grouped([8] * 64, hidden, intermediate)
    assert many == pytest.approx(known.call_us + 64 * known.active_expert_us, rel=0.01)


def test_other_gpus_are_not_taken_for_those():
    names = ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb")
    assert not any(map(machine_of, (*names, "NVIDIA H20-3e", "A100", "")))


# Calls of aiconfigurator's file from which the table's curves were not made: for those rows it has a larger group.
MEASURED = {
    ("H100", 2, 256): 66.2,
    ("H100", 4, 128): 92.4,
    ("H200", 2, 256): 59.3,
    ("H200", 4, 128): 72.4,
    ("H200", 16, 8): 205.1,
    ("B200", 2, 256): 45.6,
    ("B200", 4, 128): 55.2,
    ("GB200", 2, 256): 47.0,
    ("GB200", 4, 128): 56.1,
}


@pytest.mark.parametrize(("case", "us"), MEASURED.items())
def test_the_model_is_near_other_measured_calls(case, us):
    short, experts, rows = case
    assert MACHINES[short].grouped([rows] * experts, 7168, 2048) == pytest.approx(us, rel=0.06)


def test_cost_models_take_machines(tmp_path):
    path = tmp_path / "gpu.json"
    machine().save(path)
    assert cost_models.parse(str(path)).cost(384) == 32e6
    known = cost_models.parse("h200")
    assert known.cost(1) == pytest.approx(11.2e6) and known.cost(1024) == pytest.approx(69.7e6)
    path.write_text(json.dumps({"version": 1, **GIVEN, "launch_us": 0}))
    with pytest.raises(ValueError, match="launch_us is 0: give") as raised:
        cost_models.parse(str(path))
    assert str(raised.value).startswith(f"--cost-model {path}: ")
    with pytest.raises(ValueError, match="no GPU of H100, H200, B200, GB200, H20"):
        cost_models.parse("H300")


def test_the_module_needs_neither_torch_nor_sglang():
    code = (
        "import sys; import waterfill_rs.machine as m; m.machine_of('H20'); "
        "print([n for n in ('torch', 'sglang', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
