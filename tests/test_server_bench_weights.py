"""Dummy weights of ``benches/server``: by name, and a routed expert's by its logical id, wherever it stands; no GPU."""

import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from server import plugin, weights


def module_of(parameters):
    """A module with these parameters by their dotted names."""
    root = torch.nn.Module()
    for name, value in parameters.items():
        *path, own = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(own, torch.nn.Parameter(value, requires_grad=False))
    return root


def test_weights_are_sane_and_depend_on_their_name_alone():
    def weights_of():
        names = {
            "a.mlp.gate.weight": torch.bfloat16, "b.norm.weight": torch.bfloat16, "w13_weight": torch.float8_e4m3fn,
            "w13_weight_scale_inv": torch.float32, "k_scale": torch.float32, "embed.weight": torch.bfloat16,
            "e_score_correction_bias": torch.float32, "o_proj": torch.bfloat16,
        }  # fmt: skip
        state = {name: torch.zeros((2, 4, 8), dtype=dtype) for name, dtype in names.items()}
        model = module_of(state)
        model.register_buffer("place", torch.zeros(2, dtype=int))
        weights.fill(model)
        return {name: value.float() for name, value in model.state_dict().items()}

    one, other = weights_of(), weights_of()
    assert all((one[name] == other[name]).all() for name in one)
    assert (one["b.norm.weight"] == 1).all() and (one["k_scale"] == 1).all()
    assert (one["w13_weight_scale_inv"] == torch.tensor(weights.SCALE)).all()
    assert 0.5 < one["w13_weight"].abs().max() <= 1 and one["w13_weight"].unique().numel() > 20
    assert one["o_proj"].abs().max() <= 0.041 and one["a.mlp.gate.weight"].abs().max() < 0.2
    assert (one["place"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_fused_shared_expert_has_the_weights_of_the_dense_one(dtype):
    """Two routed experts, and the shared one as a dense MLP or as the third slot."""
    shapes = {"w13": (8, 4), "w2": (4, 4)}

    def stacks(slots):
        return {
            f"0.mlp.experts.{stack}_{name}": torch.zeros((slots, *shape), dtype=kind)
            for stack, shape in shapes.items()
            for name, kind in (("weight", dtype), ("weight_scale_inv", torch.float32))
        }

    def filled(parameters, fused):
        model = module_of(parameters)
        experts = model.get_submodule("0.mlp.experts")
        experts.num_fused_shared_experts, experts.layer_id = fused, 0
        experts.moe_ep_rank, experts.moe_ep_size = 0, 1
        weights.fill(model)
        return {name: value.float() for name, value in model.state_dict().items()}

    linear = {"w13": "gate_up_proj", "w2": "down_proj"}
    dense = {
        f"0.mlp.shared_experts.{linear[stack]}.{name}": torch.zeros(shape, dtype=kind)
        for stack, shape in shapes.items()
        for name, kind in (("weight", dtype), ("weight_scale_inv", torch.float32))
    }
    off, fused = filled(stacks(2) | dense, 0), filled(stacks(3), 1)
    for stack, layer in linear.items():
        for name in ("weight", "weight_scale_inv"):
            slots = fused[f"0.mlp.experts.{stack}_{name}"]
            assert slots[:2].equal(off[f"0.mlp.experts.{stack}_{name}"])
            assert slots[2].equal(off[f"0.mlp.shared_experts.{layer}.{name}"])
        weight = fused[f"0.mlp.experts.{stack}_weight"]
        assert not weight[2].equal(weight[0]) and weight[2].abs().max() > 0
    # What is not fused has as many routed slots as there are.
    third = filled(stacks(3), 0)["0.mlp.experts.w2_weight"][2]
    assert not third.equal(fused["0.mlp.experts.w2_weight"][2])
    with pytest.raises(ValueError, match=r"0\.mlp\.experts has 2 fused shared experts"):
        filled(stacks(4), 2)


RANKS, HIDDEN, INNER = 2, 8, 6
IN_ORDER = torch.arange(4).repeat(2, 1)
PLACED = torch.tensor([[2, 0, 1, 3, 0, 2], [3, 1, 0, 1, 2, 3]])
"""Two layers of four experts; six slots, three a rank, so two experts of each layer have a replica on the other rank."""


def ranks_of(maps, fused=0, given="its own"):
    """By rank the filled weights of a model whose experts stand so, and the rank's shared expert is ``fused`` or dense."""
    slots = maps.shape[1] // RANKS
    shapes = {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    stacks = {
        f"{layer}.mlp.experts.{stack}_weight": (slots + fused, *shape)
        for layer in range(2)
        for stack, shape in shapes.items()
    }
    found = []
    for rank in range(RANKS):
        model = module_of({name: torch.zeros(shape) for name, shape in stacks.items()})
        for layer in range(2):
            experts = model.get_submodule(f"{layer}.mlp.experts")
            experts.num_fused_shared_experts, experts.layer_id = fused, layer
            experts.moe_ep_rank, experts.moe_ep_size = rank, RANKS
        weights.fill(model, maps if given == "its own" else given)
        found.append(model.state_dict())
    return found


def expert(of, layer, physical, slots):
    """Its two matrices."""
    rank, slot = divmod(physical, slots)
    return [of[rank][f"{layer}.mlp.experts.{stack}_weight"][slot] for stack in ("w13", "w2")]


def output(of, layer, tokens, ids, slots):
    """Of a layer, for ``tokens`` ``[N, HIDDEN]`` whose experts are the physical ``ids`` ``[N, K]``."""
    rows = []
    for token, chosen in zip(tokens, ids.tolist(), strict=True):
        row = torch.zeros(HIDDEN)
        for physical in chosen:
            w13, w2 = expert(of, layer, physical, slots)
            gate, up = (w13 @ token).chunk(2)
            row = row + w2 @ (torch.nn.functional.silu(gate) * up)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [0, 1])
def test_an_experts_weights_follow_it_to_each_of_its_replicas(fused):
    in_order, placed = ranks_of(IN_ORDER), ranks_of(PLACED, fused)
    seen = []
    for layer in range(2):
        for logical in range(4):
            own = expert(in_order, layer, logical, 2)
            replicas = (PLACED[layer] == logical).nonzero().flatten().tolist()
            for physical in replicas:
                held = expert(placed, layer, physical, 3)
                assert all(a.equal(b) for a, b in zip(own, held, strict=True))
            seen.append(own[0])
    # Ranks, layers and experts differ.
    assert all(not a.equal(b) for i, a in enumerate(seen) for b in seen[:i])
    if fused:
        shared = [of["1.mlp.experts.w2_weight"][-1] for of in placed]
        assert shared[0].equal(shared[1]) and not shared[0].equal(seen[0])


def test_a_wrong_replica_gives_another_output():
    """What ``--outputs`` can see: the same bits by any replica of the right expert, and others by any wrong one."""
    in_order, placed = ranks_of(IN_ORDER), ranks_of(PLACED)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(16, HIDDEN, generator=random)
    logical = torch.stack([torch.randperm(4, generator=random)[:2] for _ in tokens])
    for layer, places in enumerate(PLACED):
        expected = output(in_order, layer, tokens, logical, 2)
        first, last = (
            torch.tensor([(places == one).nonzero()[end].item() for one in range(4)])
            for end in (0, -1)
        )
        assert not first.equal(last)
        for replicas in (first, last):
            assert output(placed, layer, tokens, replicas[logical], 3).equal(expected)
        for wrong in range(6):
            if places[wrong] == logical[0, 1]:
                continue
            ids = first[logical]
            ids[0, 1] = wrong
            found = output(placed, layer, tokens, ids, 3)
            assert found[1:].equal(expected[1:])
            assert (found[0] - expected[0]).norm() > 0.1 * expected[0].norm()


@pytest.mark.parametrize("given", [None, PLACED, IN_ORDER[:0]])
def test_without_a_map_of_its_slots_an_experts_id_is_its_place(given):
    expected, found = ranks_of(IN_ORDER), ranks_of(IN_ORDER, given=given)
    for one, other in zip(expected, found, strict=True):
        assert all(one[name].equal(other[name]) for name in one)


def test_the_map_is_the_one_that_sglang_has(monkeypatch):
    def has(metadata):
        module = SimpleNamespace(get_global_expert_location_metadata=lambda: metadata)
        monkeypatch.setitem(sys.modules, "sglang.srt.eplb.expert_location", module)

    filled = []
    monkeypatch.setattr(weights, "fill", lambda model, maps: filled.append((model, maps)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(plugin.Forced, "load", lambda *_: "forced")
    bench = plugin.Bench.__new__(plugin.Bench)
    bench.told = {"routing": "r", "placements": 1, "longest": 8}
    bench.rank = SimpleNamespace()
    has(SimpleNamespace(physical_to_logical_map=PLACED))
    bench.load("model")
    has(None)
    bench.load("another")
    (model, maps), without = filled
    assert model == "model" and maps.equal(PLACED) and without == ("another", None)
    assert (bench.rank.number, bench.rank.forced) == (1, "forced")
