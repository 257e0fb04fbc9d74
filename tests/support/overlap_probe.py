"""The part of the contract that is about shared experts beside dispatch: ``outcomes(SEAMS, RESOLVE)``.

Each check runs in two processes of its own, the two ranks of one group.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import overlap_layers
import torch
from overlap_layers import HIDDEN, RANKS, TOP_K, V3, V4, batch, checkpoint

from waterfill_rs.machine import machine_of
from waterfill_rs.sglang.overlap import _VOTES
from waterfill_rs.sglang.shared_expert import StaysFused, Unfused

FP8 = V3 | {"hidden_size": 256, "moe_intermediate_size": 128}
"""Whole blocks of 128 by 128."""
STACKS = {"gate_up_proj": "w13", "down_proj": "w2"}
ROUNDING = {
    torch.bfloat16: {"atol": 0.05, "rtol": 0.02},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
}
"""Outputs are about 1. A shared row is rounded apart, or with the routed ones, and scaled by 1 / f and by f again."""
LONGEST_S = 120


def outcomes(seams, resolve):
    """Each check's name: "ok", "none" where this version has no such thing, or what went wrong."""
    resolve(seams.moe)  # Once, before the ranks fork.
    names = [name for name in dir(OverlapChecks) if name.startswith("check_")]
    return {name.removeprefix("check_"): _outcome(name, seams, resolve) for name in names}


def _outcome(name, seams, resolve):
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=_run, args=(name, seams, resolve, rank, folder), daemon=True)
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LONGEST_S)
            process.kill()
        found = [_read(Path(folder, f"{rank}.json")) for rank in range(RANKS)]
    wrong = [outcome for outcome in found if outcome not in ("ok", "none")]
    return "\n".join(wrong) or found[0]


def _read(report):
    return json.loads(report.read_text()) if report.exists() else "this rank did not end"


def _run(name, seams, resolve, rank, folder):
    try:
        ranks = overlap_layers.Ranks(seams, resolve, rank, folder)
        outcome = getattr(OverlapChecks(ranks), name)() or "ok"
    except BaseException:
        outcome = f"rank {rank}: {traceback.format_exc()[-1500:]}"
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    if outcome == "ok":
        torch.distributed.barrier()
    os._exit(0)


class OverlapChecks:
    """One rank's. Both run the same check at the same time."""

    def __init__(self, ranks):
        self.ranks, self.seams = ranks, ranks.seams

    # What it computes

    def check_overlap_gives_what_an_unfused_layer_gives(self):
        for config in (V3, V4):
            for dtype in (torch.bfloat16, torch.float32):
                on, off = self.pair(config, 2, dtype)
                assert [moe.is_hash for moe in on.moes] == [config is V4, False]
                for overlapped, unfused in zip(on.moes, off.moes, strict=True):
                    if not self.is_balanced(overlapped):
                        assert overlapped.is_hash and self.seams.hash_topk is None
                        continue
                    for rows in (7 + self.ranks.rank, 1, 0 if self.ranks.rank else 5, 0):
                        self.is_the_same(overlapped, unfused, rows, dtype)

    def is_the_same(self, overlapped, unfused, rows, dtype):
        exchange = self.ranks.balancer(overlapped).exchange
        calls = exchange.tally()["calls"]
        beside, never_fused = (self.forward(moe, rows, dtype) for moe in (overlapped, unfused))
        assert torch.equal(beside, never_fused), (beside - never_fused).abs().max()
        assert exchange.tally()["calls"] == calls
        self.choice(overlapped).forced = "fused"
        fused = self.forward(overlapped, rows, dtype)
        self.choice(overlapped).forced = None
        assert exchange.tally()["calls"] == calls + 1
        torch.testing.assert_close(fused, beside, **ROUNDING[dtype])
        (ids, weights), (wide_ids, wide_weights) = overlapped.stand_in.seen[-2:]
        assert ids.dtype == torch.int64 and ids.shape == weights.shape == (rows, TOP_K)
        if rows:  # 0.5.14 itself gives an idle rank's empty rows a column too many.
            assert wide_ids.shape == wide_weights.shape == (rows, TOP_K + 1)
        assert torch.equal(ids, wide_ids[:, :TOP_K].long())
        assert torch.equal(weights, wide_weights[:, :TOP_K])

    def check_overlap_of_two_batches_gives_the_same(self):
        on, off = self.pair(V3, 1)
        (overlapped,), (unfused,) = on.moes, off.moes
        for rows in (9, 0):
            expected = self.forward(unfused, rows)
            for forced, width in ((None, TOP_K), ("fused", TOP_K + 1)):
                self.choice(overlapped).forced = forced
                found = self.operations(overlapped, rows)
                assert overlapped.stand_in.seen[-1][0].shape == (rows, width)
                if forced:
                    torch.testing.assert_close(found, expected, **ROUNDING[torch.bfloat16])
                else:
                    assert torch.equal(found, expected)
            self.choice(overlapped).forced = None

    def operations(self, moe, rows):
        """One layer's, in sglang's order of a decode."""
        from sglang.srt.batch_overlap.operations import _StateDict

        state = _StateDict()
        state.update({"forward_batch": batch(rows), "hidden_states_mlp_input": self.hidden(rows)})
        for name in (
            "gate",
            "select_experts",
            "dispatch_a",
            "shared_experts",
            "dispatch_b",
            "experts",
            "combine_a",
            "combine_b",
            "output",
        ):
            getattr(moe, f"op_{name}")(state)
        return state.hidden_states_mlp_output

    # When

    def check_overlap_is_for_decode_and_prefill_as_the_rule_says(self):
        from sglang.srt.layers.dp_attention import set_is_extend_in_batch

        asked = []
        rule = mock.Mock(side_effect=lambda tokens: asked.append(tokens) or (tokens or 0) > 20)
        rule.text = "in prefill of more than 20 tokens"
        groups = self.ranks.asked(enable_dp_attention=True, dp_size=RANKS)
        with mock.patch("waterfill_rs.sglang.unfusing.PrefillRule", return_value=rule), groups:
            on, _ = self.pair(V3, 1)
        (moe,) = on.moes
        widths = []
        for extends, tokens in ((False, None), (True, [3, 40]), (True, [3, 20]), (True, None)):
            set_is_extend_in_batch(extends)
            self.forward(moe, 3, global_num_tokens_cpu=tokens)
            widths.append(moe.stand_in.seen[-1][0].shape[1])
        set_is_extend_in_batch(False)
        assert widths == [TOP_K, TOP_K, TOP_K + 1, TOP_K + 1]
        assert asked == [40, 20, None], asked
        assert self.choice(moe).tally == {"overlapped": 2, "fused": 2}

    def check_overlap_is_not_for_what_a_prefill_graph_may_run(self):
        """Ranks that replay such a graph, which is captured fused, and ranks that don't are alike."""
        if self.seams.prefill_graph is None:
            return "none"
        from sglang.srt.layers.dp_attention import set_is_extend_in_batch
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        captures = mock.Mock(return_value=False)
        module, _, name = self.seams.prefill_graph.rpartition(".")
        overlap = mock.patch.dict(os.environ, WATERFILL_RS_SHARED="overlap")
        with overlap, mock.patch.object(self.ranks.resolve(module), name, captures):
            on, _ = self.pair(V3, 1)
        (moe,) = on.moes
        (vote,) = set(_VOTES) & set(ForwardBatch.__dataclass_fields__)
        widths = []
        for extends, votes, capturing in (
            (True, False, False),
            (True, True, False),
            (False, False, True),
            (False, True, False),
        ):
            set_is_extend_in_batch(extends)
            captures.return_value = capturing
            self.forward(moe, 3, **{vote: votes})
            widths.append(moe.stand_in.seen[-1][0].shape[1])
        set_is_extend_in_batch(False)
        assert widths == [TOP_K, TOP_K + 1, TOP_K + 1, TOP_K], widths

    def check_overlap_ends_with_the_call(self):
        on, _ = self.pair(V3, 1)
        (moe,) = on.moes
        within = []

        def fails(*_, **__):
            within.append((moe.num_fused_shared_experts, self.overlap(moe).runs))
            raise RuntimeError("as a kernel may")

        with mock.patch.object(moe.experts, "forward", fails):
            for _ in range(2):
                with raises(RuntimeError, "as a kernel may"):
                    self.forward(moe, 4)
                assert moe.num_fused_shared_experts == 1 and not self.overlap(moe).runs
        assert within == [(0, True)] * 2
        self.forward(moe, 4)
        assert moe.num_fused_shared_experts == 1 and not self.overlap(moe).runs

    # What it has

    def check_overlap_owns_no_memory(self):
        on = self.ranks.build(V3, 2)
        before = self.of_model(on)
        assert "beside dispatch in decode" in self.ranks.prepare(on)
        assert self.of_model(on) == before
        self.forward(on.moes[0], 4)
        assert self.of_model(on) == before
        for moe in on.moes:
            for linear, stack in STACKS.items():
                view = getattr(moe.shared_experts, linear).weight
                slots = getattr(moe.experts, f"{stack}_weight")
                assert view.untyped_storage().data_ptr() == slots.untyped_storage().data_ptr()
                assert view.data_ptr() == slots[-1].data_ptr() and view.shape == slots[-1].shape

    def of_model(self, model):
        """All that a model shows of its weights to those who walk through it."""
        return {
            "parameters": [(n, p.data_ptr(), p.nbytes) for n, p in model.named_parameters()],
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "state": [(name, value.data_ptr()) for name, value in model.state_dict().items()],
            "rebalanced": [w.data_ptr() for moe in model.moes for w in moe.get_moe_weights()],
            "slots": [len(w) for moe in model.moes for w in moe.get_moe_weights()],
        }

    def check_overlap_follows_weights(self):
        on, off = self.pair(V3, 1)
        (moe,), (unfused,) = on.moes, off.moes
        for change in (self.load_shared, self.rebind, self.rebind_data):
            old = self.forward(moe, 6)
            change(moe, unfused)
            moe.stand_in.gather()
            unfused.stand_in.gather()
            new = self.forward(moe, 6)
            assert not torch.equal(new, old), change.__name__
            assert torch.equal(new, self.forward(unfused, 6)), change.__name__

    def load_shared(self, moe, unfused):
        """In place, as weights are updated while a server runs."""
        *_, weights = checkpoint(99)[2]
        for shard, weight in weights.items():
            name = "w2_weight" if shard == "w2" else "w13_weight"
            parameter = getattr(moe.experts, name)
            last = overlap_layers.EXPERTS
            parameter.weight_loader(parameter, weight, name, shard_id=shard, expert_id=last)
        for place, shard in enumerate(("w1", "w3")):
            parameter = unfused.shared_experts.gate_up_proj.weight
            parameter.weight_loader(parameter, weights[shard], place)
        parameter = unfused.shared_experts.down_proj.weight
        parameter.weight_loader(parameter, weights["w2"])

    def rebind(self, moe, unfused):
        """Another parameter under the same name."""
        doubled = torch.nn.Parameter(moe.experts.w13_weight.data * 2, requires_grad=False)
        moe.experts.w13_weight = doubled
        self.double(unfused, "w13_weight", "gate_up_proj")

    def rebind_data(self, moe, unfused):
        """The same parameter with other memory."""
        moe.experts.w2_weight.data = moe.experts.w2_weight.data * 2
        self.double(unfused, "w2_weight", "down_proj")

    def double(self, unfused, stack, linear):
        getattr(unfused.experts, stack).data.mul_(2)
        getattr(unfused.shared_experts, linear).weight.data.mul_(2)

    def check_overlap_reads_fp8_blocks(self):
        """As far as there is no GPU: the views and what is refused. Values are compared on a GPU."""
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        blocks = Fp8Config(True, "dynamic", weight_block_size=[128, 128])
        moe = self.ranks.build_fp8(FP8, blocks)
        for stack in moe.experts.parameters():
            stack.data.view(torch.uint8).random_(0, 120)
        mlp = Unfused(moe, "layers.0.mlp", torch.bfloat16, self.seams).mlp
        of_mlp = dict(mlp.named_parameters())
        assert len(of_mlp) == 4
        for name, view in of_mlp.items():
            linear, _, kind = name.partition(".")
            slots = getattr(moe.experts, f"{STACKS[linear]}_{kind}")
            assert view.data_ptr() == slots[-1].data_ptr() and view.dtype == slots.dtype, name
            assert torch.equal(view.view(torch.uint8), slots[-1].view(torch.uint8)), name
        assert not mlp.gate_up_proj.weight_scale_inv.format_ue8m0

        scales = moe.experts.w13_weight_scale_inv
        scales.data = scales.data.to(torch.int32)  # As Blackwell's kernels have them, packed.
        with raises(StaysFused, "w13_weight_scale_inv has slots of torch.int32"):
            Unfused(moe, "layers.0.mlp", torch.bfloat16, self.seams)
        whole = self.ranks.build_fp8(FP8, Fp8Config(True, "dynamic"))
        with raises(StaysFused, "Fp8LinearMethod has no blocks with float32 scales"):
            Unfused(whole, "layers.0.mlp", torch.bfloat16, self.seams)

    # What stays fused

    def check_overlap_is_not_for_all(self):
        for told, hindered in self.hindrances().items():
            for shared in ("auto", "overlap"):
                model = self.ranks.build(V3, 2)
                with hindered(model), mock.patch.dict(os.environ, WATERFILL_RS_SHARED=shared):
                    if shared == "auto":
                        line = self.ranks.prepare(model)
                        assert f"shared experts: fused in every batch, because {told}" in line, line
                    else:
                        self.stops(model, told)
                self.is_as_built(model)

    def hindrances(self):
        """What we say, and what makes it so for a model of two layers."""
        import sglang

        forward, asked = f"{self.seams.moe}.forward", self.ranks.asked
        found = {
            f"another plugin hooks {forward}": lambda _: hooked(forward),
            f"another plugin hooks {self.seams.mlp}": lambda _: hooked(self.seams.mlp),
            "not known of sglang 99.0": lambda _: mock.patch.object(sglang, "__version__", "99.0"),
            "layers.0.mlp has a forward of its own": lambda model: mock.patch.dict(
                vars(model.moes[0]), forward=model.moes[0].forward
            ),
            "--enable-lora: adapters": lambda _: asked(enable_lora=True),
            "--enable-torch-compile: a compiled": lambda _: asked(enable_torch_compile=True),
            "experts' weights are offloaded": lambda _: asked(cpu_offload_gb=1),
            "SGLANG_SCHEDULER_SKIP_ALL_GATHER: ranks": lambda _: mock.patch.dict(
                os.environ, SGLANG_SCHEDULER_SKIP_ALL_GATHER="yes"
            ),
            "layers.1.mlp: UnquantizedLinearMethod and Other are not known": lambda model: (
                of_another_method(model.moes[1].experts)
            ),
            "layers.1.mlp: w13_weight has slots of torch.bfloat16": lambda model: transposed(
                model.moes[1].experts
            ),
            "1 of 2 MoE layers are no DeepseekV2MoE": lambda model: of_another_class(
                model.layers[1]
            ),
        }
        if self.seams.mega_moe:
            from sglang.srt.layers.moe import utils

            found["the MoE layers do not run on deepep"] = lambda _: mock.patch.object(
                utils, "get_moe_a2a_backend", lambda: utils.MoeA2ABackend("megamoe")
            )
        return found

    def stops(self, model, told):
        with raises(SystemExit, f"shared experts cannot run beside dispatch: {told}"):
            self.ranks.prepare(model)

    def check_overlap_is_not_where_fused_was_asked_for(self):
        model = self.ranks.build(V3, 2)
        with mock.patch.dict(os.environ, WATERFILL_RS_SHARED="fused"):
            assert "shared experts: fused, as asked" in self.ranks.prepare(model)
        self.is_as_built(model)
        self.forward(model.moes[0], 3)
        assert model.moes[0].stand_in.seen[-1][0].shape == (3, TOP_K + 1)

    def check_overlap_refuses_figures_of_another_machine(self):
        model = self.ranks.build(V3, 1)
        figures = dataclasses.replace(machine_of("H200"), shape=(HIDDEN, 1))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "figures.json")
            for told in ("No such file", "version is", f"experts of ({HIDDEN}, 1), (hidden"):
                with mock.patch.dict(os.environ, WATERFILL_RS_MACHINE=str(path)):
                    with raises(SystemExit, told):
                        self.ranks.prepare(model)
                    self.is_as_built(model)
                if told == "No such file":
                    path.write_text("{}")
                else:
                    figures.save(path)

    def check_overlap_is_for_all_ranks_or_none(self):
        other = self.ranks.rank == 1
        for on_rank_1, reason in (
            (self.ranks.asked(enable_lora=True), "--enable-lora"),
            (mock.patch.dict(os.environ, WATERFILL_RS_SHARED="fused"), "fused, as asked"),
        ):
            model = self.ranks.build(V3, 2)
            begin = time.monotonic()
            with on_rank_1 if other else contextlib.nullcontext():
                line = self.ranks.prepare(model)
            assert time.monotonic() - begin < LONGEST_S / 4, "nobody waits for the other in vain"
            assert ("" if other else "fused in every batch, because EP rank 1: ") + reason in line
            self.is_as_built(model)

    def check_overlap_that_cannot_be_made_ends_no_server(self):
        """Whatever sglang raises where a dense MLP is made."""
        model = self.ranks.build(V3, 1)
        fails = mock.Mock(side_effect=RuntimeError("no kernel"))
        module, _, name = self.seams.mlp.rpartition(".")
        with mock.patch.object(self.ranks.resolve(module), name, fails):
            line = self.ranks.prepare(model)
        assert "layers.0.mlp: no dense MLP can be made of it: RuntimeError('no kernel')" in line
        self.is_as_built(model)

    def is_as_built(self, model):
        for moe in model.moes:
            ours = {"op_select_experts", "op_shared_experts"} & set(vars(moe))
            assert not ours and moe.__dict__.get("shared_experts") is None
            balancer = self.ranks.balancer(moe)
            assert getattr(balancer, "overlap", None) is None

    # Helpers

    def pair(self, config, layers, dtype=torch.bfloat16):
        """A model that was prepared, and one with the same weights whose shared experts were never fused."""
        on = self.ranks.build(config, layers, dtype)
        line = self.ranks.prepare(on, dtype)
        assert "shared experts: beside dispatch in decode" in line, line
        return on, self.ranks.build(config, layers, dtype, fused=False)

    def is_balanced(self, moe):
        return getattr(moe.topk, self.seams.enabled, False)

    def overlap(self, moe):
        return self.ranks.balancer(moe).overlap

    def choice(self, moe):
        return self.overlap(moe).choice

    def hidden(self, rows, dtype=torch.bfloat16):
        random = torch.Generator().manual_seed(10 * rows + self.ranks.rank)
        return torch.randn(rows, HIDDEN, generator=random).to(dtype)

    def forward(self, moe, rows, dtype=torch.bfloat16, **fields):
        given = batch(rows, **fields)
        ids = {"input_ids_global": given.input_ids} if moe.is_hash else {}
        return moe.forward(self.hidden(rows, dtype), given, **ids)


@contextlib.contextmanager
def hooked(target):
    """As if another plugin had registered a hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    with mock.patch.dict(HookRegistry._hooks, {target: [("around", print, 0)]}):
        yield


@contextlib.contextmanager
def of_another_method(experts):
    method = experts.quant_method
    before = type(method)
    method.__class__ = type("Other", (before,), {})
    yield
    method.__class__ = before


@contextlib.contextmanager
def transposed(experts):
    """Slots of the same shape and bytes whose rows and columns change places."""
    before = experts.w13_weight.data
    experts.w13_weight.data = before.transpose(1, 2).contiguous().transpose(1, 2)
    yield
    experts.w13_weight.data = before


@contextlib.contextmanager
def of_another_class(layer):
    before, layer.mlp = layer.mlp, torch.nn.Module()
    layer.mlp.topk, layer.mlp.experts = before.topk, before.experts
    yield
    layer.mlp = before


@contextlib.contextmanager
def raises(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__} with {text!r}")
