"""``benches/server`` forces logical experts, and counts the replicas that are chosen for them; no GPU."""

import inspect
from types import SimpleNamespace

import pytest
from test_server_bench_plugin import Event, set_round

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from server.control import ROWS, TIMED, Control
from server.forced import Forced
from server.plugin import Bench


def a_bench(tmp_path, **more):
    Control(tmp_path / "control", create=True)
    told = {"control": str(tmp_path / "control"), "folder": str(tmp_path), "ranks": 2}
    shape = {"experts": 6, "mode": "off", "first_layer": 1, "switches": False}
    return Bench({**told, **shape, **more}, None, object)


def test_logical_experts_are_forced_before_sglang_chooses_replicas(tmp_path):
    bench = a_bench(tmp_path)
    replicas = torch.tensor([0, 1, 5, 3])  # Expert 2's rows go to its second replica.

    def chooses(topk_ids, topk_weights, layer_id):
        return replicas[topk_ids].to(topk_ids.dtype), topk_weights, "recorded"

    router = torch.tensor([[3, 3], [3, 3]], dtype=torch.int32)
    given = {"topk_ids": router, "topk_weights": "weights"}
    # Before the model is loaded the router's own ids are.
    assert bench.choose(chooses, **given, layer_id=2)[0].tolist() == [[3, 3], [3, 3]]
    tables = np.array([[[0, 1], [0, 1], [0, 1]], [[2, 1], [0, 2], [3, 3]]], dtype=np.int16)
    bench.rank.forced = Forced([tables], 4, "cpu")
    ids, *rest = bench.choose(chooses, **given, layer_id=2)
    # The second MoE layer's first two tokens, by physical experts.
    assert ids.tolist() == [[5, 1], [0, 5]] and ids.dtype is torch.int32
    assert rest == ["weights", "recorded"] and router.tolist() == [[3, 3], [3, 3]]
    assert bench.choose(chooses, **given, layer_id=None)[0].tolist() == [[3, 3], [3, 3]]


def test_without_a_balancer_the_chosen_replicas_are_counted(tmp_path):
    bench = a_bench(tmp_path)
    rank = bench.rank
    rank._event, rank._synchronize, rank._memory = Event, lambda: None, lambda: {}
    graphs = []

    def original(runner, batch):
        graphs.append(runner.decode_cuda_graph_runner)
        chosen = torch.tensor([[5, 1], [0, 5], [-1, -1]])
        bench.choose(lambda **_: (chosen,), layer_id=4, topk_ids=chosen)

    runner = SimpleNamespace(decode_cuda_graph_runner="graphs")
    batch = SimpleNamespace(input_ids=torch.zeros(4))
    set_round(rank.control, round=1, kind=ROWS)
    for _ in range(2):
        rank.forward(original, runner, batch)
    # Two ranks of three experts; a step that counts replays no graph, and the lead's do.
    assert rank.results()["rows"][1] == (1, 4, [[1, 1, 0], [0, 0, 2]], [0, 0])
    assert graphs == ["graphs", None] and runner.decode_cuda_graph_runner == "graphs"
    set_round(rank.control, round=2, kind=TIMED)
    for _ in range(2):
        rank.forward(original, runner, batch)
    assert rank.results()["rows"] == [] and graphs[2:] == ["graphs", "graphs"]


def test_sglang_maps_what_is_forced(tmp_path, monkeypatch):
    """The installed sglang chooses replicas between the router's ids and what comes back: there it is that ids are forced."""
    topk = pytest.importorskip("sglang.srt.layers.moe.topk")
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    bench = a_bench(tmp_path)
    bench.rank.forced = Forced([np.array([[[2, 1], [0, 2]]], dtype=np.int16)], 4, "cpu")
    monkeypatch.setattr(topk, "_is_cuda", True)  # Only there is anything chosen.
    after = inspect.unwrap(topk._biased_grouped_topk_postprocess)
    monkeypatch.setattr(topk, "_biased_grouped_topk_postprocess", after)
    original = topk._post_process_topk_ids
    monkeypatch.setattr(
        topk, "_post_process_topk_ids", lambda **given: bench.choose(original, **given)
    )
    info = ExpertLocationDispatchInfo("static", torch.tensor([3, 1, 5, 4]), None, None, 6)
    router = lambda **_: (torch.ones(2, 2), torch.full((2, 2), 3, dtype=torch.int32))  # noqa: E731
    config = topk.TopKConfig(top_k=2, renormalize=True, custom_routing_function=router)
    monkeypatch.setattr(topk, "capture_routed_experts_if_allowed", lambda *_: None, raising=False)
    found = topk.select_experts(
        torch.zeros(2, 8), torch.rand(2, 4), config,
        layer_id=1, expert_location_dispatch_info=info,
    )  # fmt: skip
    assert found.topk_ids.tolist() == [[5, 1], [3, 5]]
