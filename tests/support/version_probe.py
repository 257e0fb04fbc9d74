"""What the contract asks of one sglang, in a process of its own: ``REPORT.json``.

Each check is written there as "ok", as "none" or "refused" where this version has or gets no such thing, or as what
went wrong; ``test_versions.py`` reads it.
"""

import argparse
import contextlib
import inspect
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path
from unittest import mock

from mega_moe_probe import EXPERTS, TOP_K, MegaMoeProbe
from replica_probe import ReplicaProbe

RANKS, RANK, REDUNDANT, TOKENS, REAL = 8, 3, 8, 200, 70
PHYSICAL = EXPERTS + REDUNDANT


class Probe(MegaMoeProbe, ReplicaProbe):
    sizes = EXPERTS, PHYSICAL

    def __init__(self):
        os.environ["SGLANG_OPT_USE_FUSED_HASH_TOPK"] = "0"
        from sglang.srt.plugins import load_plugins

        load_plugins()
        import torch

        from waterfill_rs.sglang import compat, plugin

        torch.set_num_threads(
            1
        )  # A pool of threads would not come along into the forks of a check.
        self.torch, self.plugin = torch, plugin
        self.seams, reasons = compat.find()
        assert self.seams, reasons
        self.resolve = compat.resolve

    def checks(self):
        names = [name for name in dir(self) if name.startswith("check_")]
        return {name.removeprefix("check_"): getattr(self, name) for name in names}

    # What is replaced

    def check_classes_are_ours_under_every_name(self):
        assert set(self.plugin.hooked) >= {self.seams.balancer, self.seams.hash_topk} - {None}
        for name, ours in self.plugin.hooked.items():
            assert self.resolve(name) is ours, name
        if self.seams.hash_topk:
            home = self.seams.prepare.rpartition(".")[0].removesuffix(".ModelRunner")
            assert self.resolve(f"{home}.HashTopK") is self.plugin.hooked[self.seams.hash_topk]

    def check_flags_are_in_help_and_travel_to_children(self):
        from sglang.srt.server_args import ServerArgs

        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        assert "--waterfill-rs-exchange" in parser.format_help()
        assert self.seams.flag in parser.format_help()
        flags = ["--waterfill-rs", "rust", "--waterfill-rs-timeout-us", "77", self.seams.flag]
        parsed = parser.parse_args(["--model-path", "dummy", "--device", "cpu", *flags])
        ServerArgs.__post_init__ = lambda self: None  # resolution wants a model
        pickled = pickle.dumps(ServerArgs.from_cli_args(parsed))
        sys.modules["sglang.srt.ray.scheduler_actor"] = types.ModuleType("as if Ray made actors")
        sent = pickle.dumps(pickle.loads(pickled))
        del sys.modules["sglang.srt.ray.scheduler_actor"]
        for arguments, child in ((pickled, "any"), (sent, "an actor")):
            assert getattr(pickle.loads(arguments), self.seams.switch), child
            assert os.environ.pop("WATERFILL_RS") == "rust", child
            assert os.environ.pop("WATERFILL_RS_TIMEOUT_US") == "77", child
        assert b"waterfill_rs" not in pickled

    def check_metrics_are_pushed_after_sglangs(self):
        from waterfill_rs.sglang import loaded_hooks, metrics

        assert loaded_hooks.found()[metrics.SEAM]
        takes = list(inspect.signature(self.resolve(metrics.SEAM)).parameters)
        assert takes[:2] == ["self", "stats"], takes

    # The hash router

    def check_hash_router_refuses_to_run_before_preparation(self):
        layer = self.hash_layer()
        for call in (lambda: self.forward(layer), lambda: self.idle(layer)):
            with self.raises(RuntimeError, "must be prepared by ModelRunner"):
                call()

    def check_hash_router_expands(self):
        layer = self.hash_layer()
        self.prepare(layer)
        routed = self.without_waterfill(layer, self.forward)
        self.expansion(routed, self.forward(layer), 1 / 1.5)

    def check_hash_router_expands_nothing_on_an_idle_rank(self):
        layer = self.hash_layer()
        self.prepare(layer)
        empty = self.idle(layer)
        assert empty.topk_ids.shape == empty.topk_weights.shape == (0, TOP_K + 1)

    def check_hash_router_gives_padded_rows_no_shared_row(self):
        layer = self.hash_layer()
        self.prepare(layer)
        self.is_padded(self.expanded(layer, self.forward, self.pad))

    # The other router

    def check_v3_router_gives_padded_rows_no_shared_row(self):
        layer = self.v3_layer(1.0)
        self.prepare(layer)
        self.is_padded(self.expanded(layer, self.forward_v3, self.pad))

    def pad(self, ids):
        return ids.index_fill(0, self.torch.arange(REAL, TOKENS), -1)

    def is_padded(self, expanded):
        assert (expanded.topk_ids[REAL:] == -1).all()
        assert (expanded.topk_weights[REAL:, -1] == 0).all()
        assert (expanded.topk_ids[:REAL, -1] % (PHYSICAL // RANKS + 1) == PHYSICAL // RANKS).all()

    def check_v3_router_expands_nothing_on_an_idle_rank(self):
        layer = self.v3_layer(1.0)
        self.prepare(layer)
        empty = self.expanded(layer, self.forward_v3, lambda ids: ids[:0])
        assert empty.topk_ids.shape == (0, TOP_K + 1)

    def expanded(self, layer, forward, change):
        """What a prepared router makes of its own ids, changed here: on the CPU not every version can do it itself."""
        routed = self.without_waterfill(layer, forward)
        ids = change(routed.topk_ids)
        given = routed._replace(topk_ids=ids, topk_weights=routed.topk_weights[: len(ids)])
        return getattr(layer, self.seams.expands)(given, len(ids))

    def check_two_batches_are_levelled_one_by_one(self):
        layer = self.v3_layer(1.0)
        self.prepare(layer)
        for rows in (slice(0, 90), slice(90, None)):
            routed = self.without_waterfill(layer, lambda one, r=rows: self.forward_v3(one, r))
            self.expansion(routed, self.forward_v3(layer, rows), 1.0)

    # Preparation

    def check_draft_model_has_an_exchange_of_its_own(self):
        layers = target, other, draft = [self.v3_layer(1.0) for _ in range(3)]
        self.prepare(target, other)
        self.prepare(draft)
        exchanges = [getattr(layer, self.seams.holder).exchange for layer in layers]
        assert exchanges[0] is exchanges[1] is not exchanges[2]

    def check_deterministic_inference_takes_own_counts(self):
        layer = self.v3_layer(1.0)
        fields = {"ep_num_redundant_experts": 0, self.seams.switch: True}
        with self.arguments(enable_deterministic_inference=True, **fields):
            self.prepare(layer)
        exchange = getattr(layer, self.seams.holder).exchange
        assert exchange.name == "solo" and "deterministic" in exchange.reason

    def check_v3_router_through_the_same_balancer(self):
        layer = self.v3_layer(2.5)
        self.prepare(layer)
        routed = self.without_waterfill(layer, self.forward_v3)
        self.expansion(routed, self.forward_v3(layer), 1 / 2.5)

    def check_redundant_experts_are_counted_or_refused(self):
        layer = self.v3_layer(1.0)
        if self.seams.redundant:
            self.prepare(layer)
            assert getattr(layer, self.seams.holder).num_routed_experts == PHYSICAL
        else:
            with self.arguments(ep_num_redundant_experts=REDUNDANT):
                self.prepare(layer)
            self.is_sglangs_own(layer)
            return "refused"

    def check_redundant_experts_before_and_after_a_rebalance(self):
        if not self.seams.redundant:
            return "refused"
        layer, torch = self.v3_layer(1.0), self.torch
        self.prepare(layer)
        routed = self.without_waterfill(layer, self.forward_v3)
        torch.manual_seed(7)
        for mapping in (torch.arange(EXPERTS) + REDUNDANT, torch.randperm(PHYSICAL)[:EXPERTS]):
            physical = mapping[routed.topk_ids.long()].to(routed.topk_ids.dtype)
            assert physical.max() >= EXPERTS
            expanded = self.expanded(layer, self.forward_v3, lambda _, ids=physical: ids)
            self.expansion(routed._replace(topk_ids=physical), expanded, 1.0)

    def check_experts_that_do_not_divide_are_refused(self):
        with self.raises(
            ValueError, f"{PHYSICAL - 1} physical routed experts do not divide over 8"
        ):
            self.prepare(self.v3_layer(1.0), missing=1)

    def check_elastic_ep_leaves_sglangs_own(self):
        layer = self.v3_layer(1.0)
        with self.arguments(elastic_ep_backend="mooncake"):
            self.prepare(layer)
        self.is_sglangs_own(layer)

    def is_sglangs_own(self, layer):
        module = type(getattr(layer, self.seams.holder)).__module__
        assert module == self.seams.balancer.rpartition(".")[0]

    def check_other_models_are_left_alone(self):
        layer = self.v3_layer(1.0)
        setattr(layer, self.seams.enabled, False)
        self.prepare(layer)
        assert getattr(layer, self.seams.holder) is None

    # Live counts

    def check_live_counts_of_two_ranks_give_the_optimum(self):
        self.two_ranks_reach_the_optimum(self.live_rank)

    def two_ranks_reach_the_optimum(self, run):
        import waterfill_rs

        fork = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:
            ranks = [fork.Process(target=run, args=(rank, folder)) for rank in (0, 1)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(120)
                assert rank.exitcode == 0, rank.exitcode
            found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]
        for calls in zip(*found, strict=True):
            routed, shared, tokens = (
                [sum(column) for column in zip(*(call[name] for call in calls), strict=True)]
                for name in ("routed", "shared", "tokens")
            )
            plan = waterfill_rs.plan(routed, tokens, ranks=2)
            assert max(r + s for r, s in zip(routed, shared, strict=True)) == plan.optimum

    def live_rank(self, rank, folder):
        """One of two processes: three calls of two layers, over the board; writes rows by rank of each call."""
        layers, exchange = self.join_two(rank, folder)
        found = []
        for call in range(3):
            rows = slice(0, 40 + 30 * rank + call)
            ids = self.forward_v3(layers[call % 2], rows).topk_ids
            found.append(self.rows_by_rank(rank, rows.stop, ids))
        self.tell(rank, folder, exchange, found)

    def join_two(self, rank, folder):
        """Two layers of this rank of two, joined over the board, and their exchange."""
        import torch.distributed as dist

        os.environ["WATERFILL_RS_TIMEOUT_US"] = "10000000"
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        group = types.SimpleNamespace(ranks=[0, 1])
        module, _, name = self.seams.group.rpartition(".")
        setattr(self.resolve(module), name, lambda: group)
        self.be(2, rank)
        layers = [self.v3_layer(1.0), self.v3_layer(1.0)]
        self.prepare(*layers)
        return layers, getattr(layers[0], self.seams.holder).exchange

    def rows_by_rank(self, rank, tokens, ids):
        ids = ids // (PHYSICAL // 2 + 1)
        routed, shared = (
            self.torch.bincount(part.flatten(), minlength=2).tolist()
            for part in (ids[:, :-1], ids[:, -1])
        )
        return {
            "routed": routed,
            "shared": shared,
            "tokens": [tokens * (r == rank) for r in (0, 1)],
        }

    def tell(self, rank, folder, exchange, found):
        tally = exchange.tally()
        assert exchange.name == "board" and tally["live"] == tally["calls"] == len(found), tally
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        self.torch.distributed.barrier()

    # The recorder

    def check_recorder_takes_counts_with_a_shared_slot(self):
        module, recorder = self.recording()
        gatherer = module._DeepepLowLatencySinglePassGatherer(self.metadata(), RANK)
        counts = self.torch.arange(PHYSICAL // RANKS + 1, dtype=self.torch.int)
        gatherer.on_deepep_dispatch_low_latency(layer_idx=1, local_physical_count_of_layer=counts)
        self.is_recorded(gatherer.collect(), recorder)

    def check_recorder_takes_them_in_normal_mode(self):
        module, recorder = self.recording()
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert")
        counts = list(range(PHYSICAL // RANKS + 1))
        # Not for the checks that come later, whose ranks are two.
        with mock.patch.object(self.torch.distributed, "get_rank", lambda: 0):
            gatherer = module._DeepepNormalSinglePassGatherer(self.metadata(), RANK)
            gatherer.on_deepep_dispatch_normal(
                layer_idx=1, local_physical_count_of_layer=counts, **dict.fromkeys(names)
            )
            self.is_recorded(gatherer.collect(), recorder)

    def check_recorder_counts_before_dispatch_in_mode_auto(self):
        _, recorder = self.recording()

        def none(*_):
            raise NotImplementedError

        hook = recorder.gatherer_of_auto(self.seams)
        with self.arguments(**{self.seams.switch: True}):
            gatherer = hook(none, self.server_args, self.metadata(), RANK)
        gatherer.on_select_experts(layer_idx=0, topk_ids=self.torch.tensor([[1, 2], [2, -1]]))
        assert gatherer.collect()["global_physical_count"][0, :3].tolist() == [0, 1, 2]

    def recording(self):
        """sglang's module with its devices on the CPU, and ours, told that Waterfill is on."""
        from waterfill_rs.sglang import recorder

        recorder.shared_slots_come()
        module = self.resolve(self.seams.gatherers)
        if hasattr(module, "get_device"):
            module.get_device = lambda: "cpu"
        else:  # Before 0.5.18 the device is in the arguments.
            self.server_args.device = "cpu"
        return module, recorder

    def metadata(self):
        local = PHYSICAL // RANKS
        return types.SimpleNamespace(
            num_layers=2, num_physical_experts=PHYSICAL, num_local_physical_experts=local
        )

    def is_recorded(self, collected, recorder):
        local = PHYSICAL // RANKS
        own = collected["global_physical_count"][1, local * RANK : local * (RANK + 1)]
        assert own.tolist() == list(range(local))
        assert collected[recorder.SHARED_ROWS].tolist() == [0, local]

    # How each version is asked

    def start(self):
        """A context as sglang's scheduler has it, with Waterfill on."""
        fields = {self.seams.switch: True}
        if self.seams.redundant:
            fields["ep_num_redundant_experts"] = REDUNDANT
        try:
            from sglang.srt.runtime_context import get_context

            install = get_context().override_server_args
        except (ImportError, AttributeError):  # Before 0.5.16.
            from sglang.srt import server_args

            arguments = object.__new__(server_args.ServerArgs)
            vars(arguments).update(fields, model_path="dummy", device="cpu")
            server_args.set_global_server_args_for_scheduler(arguments)
        else:
            install(model_path="dummy", **fields).install()
        self.server_args = self.resolve(self.seams.arguments)()
        self.parallel = contextlib.ExitStack()
        self.be(RANKS, RANK)
        with contextlib.suppress(ImportError):
            from sglang.srt.configs.shared_experts import SharedExpertsConfig
            from sglang.srt.runtime_context import get_model

            shared = SharedExpertsConfig(use_waterfill=True)
            self.parallel.enter_context(get_model().override(shared_experts=shared))

    def be(self, ranks, rank):
        """This process is one rank of so many, for the preparations to come."""
        self.ranks, self.rank = ranks, rank
        with contextlib.suppress(ImportError, ValueError):
            from sglang.srt.runtime_context import get_parallel

            widths = {"tp_size": ranks, "attn_tp_size": ranks, "moe_ep_size": ranks}
            places = {"tp_rank": rank, "attn_tp_rank": rank, "moe_ep_rank": rank}
            self.parallel.enter_context(get_parallel().override(**widths, **places))

    @contextlib.contextmanager
    def arguments(self, **fields):
        """Arguments in force with these fields, at the place where we read them."""
        module, _, name = self.seams.arguments.rpartition(".")
        home, original = self.resolve(module), self.resolve(self.seams.arguments)
        setattr(home, name, lambda: types.SimpleNamespace(**fields))
        try:
            yield
        finally:
            setattr(home, name, original)

    @contextlib.contextmanager
    def raises(self, kind, text):
        try:
            yield
        except kind as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no {kind.__name__} with {text!r}")

    def hash_layer(self):
        """K routed experts and one shared one that Waterfill takes over."""
        router = self.resolve(self.seams.hash_topk)
        if "num_fused_shared_experts" in inspect.signature(router).parameters:
            return router(TOP_K + 1, EXPERTS, 1, 1000)
        return router(TOP_K, EXPERTS, vocab_size=1000, layer_id=0)

    def v3_layer(self, factor):
        from sglang.srt.layers.moe.topk import TopK

        layer_id = {"layer_id": 2} if "layer_id" in inspect.signature(TopK).parameters else {}
        if "num_fused_shared_experts" in inspect.signature(TopK).parameters:
            return TopK(
                TOP_K + 1, num_fused_shared_experts=1, routed_scaling_factor=factor, **layer_id
            )
        return TopK(TOP_K, routed_scaling_factor=factor, **layer_id)

    def forward(self, layer):
        torch = self.torch
        torch.manual_seed(0)
        logits, ids = torch.randn(TOKENS, EXPERTS), torch.randint(0, 40, (TOKENS,))
        return layer(torch.zeros(TOKENS, 8), logits, ids)

    def forward_v3(self, layer, rows=slice(None)):
        torch = self.torch
        torch.manual_seed(1)
        logits = torch.randn(TOKENS, EXPERTS) + torch.linspace(0, 2, EXPERTS)
        return layer.forward_native(torch.zeros(TOKENS, 8)[rows], logits[rows])

    def idle(self, layer):
        return layer.empty_topk_output(self.torch.device("cpu"))

    def without_waterfill(self, layer, forward):
        balancer = getattr(layer, self.seams.holder)
        setattr(layer, self.seams.holder, None)
        setattr(layer, self.seams.enabled, False)
        routed = forward(layer)
        setattr(layer, self.seams.holder, balancer)
        setattr(layer, self.seams.enabled, True)
        return routed

    def prepare(self, *layers, missing=0):
        # Where preparation doesn't add redundant experts, all are given as the model's.
        experts = (EXPERTS if self.seams.redundant else PHYSICAL) - missing
        model = self.torch.nn.ModuleList(layers)
        config = types.SimpleNamespace(hf_config=types.SimpleNamespace(n_routed_experts=experts))
        prepare = self.resolve(self.seams.prepare)
        known = {
            "model": model,
            "model_config": config,
            "server_args": self.server_args,
            "moe_ep_size": self.ranks,
            "moe_ep_rank": self.rank,
        }
        takes = inspect.signature(prepare).parameters
        if "self" in takes:
            return prepare(types.SimpleNamespace(**known))
        return prepare(**{name: value for name, value in known.items() if name in takes})

    def expansion(self, routed, expanded, shared_weight):
        """Against the definition: remapped ids, equal weights, and the level of these counts."""
        torch = self.torch
        slot = PHYSICAL // RANKS
        ids, shared = expanded.topk_ids[:, :-1], expanded.topk_ids[:, -1]
        assert expanded.topk_ids.dtype == routed.topk_ids.dtype
        assert torch.equal(ids, routed.topk_ids + routed.topk_ids // slot)
        assert torch.equal(expanded.topk_weights[:, :-1], routed.topk_weights)
        weights = expanded.topk_weights[:, -1]
        assert torch.allclose(weights, torch.full_like(weights, shared_weight))
        assert (shared % (slot + 1) == slot).all()
        rows = torch.bincount(expanded.topk_ids.flatten() // (slot + 1), minlength=RANKS)
        before = torch.bincount(routed.topk_ids.flatten() // slot, minlength=RANKS)
        level = int(before.max())
        while int((level - before).clamp(min=0).sum()) < len(ids):
            level += 1
        assert int(rows.max()) == level


def untouched():
    """With WATERFILL_RS=off: nothing of sglang is ours, and nothing runs."""
    from sglang.srt.plugins import load_plugins

    threads = set(threading.enumerate())
    before = set(sys.modules)
    load_plugins()
    from sglang.srt.plugins.hook_registry import HookRegistry

    brought = {name for name in set(sys.modules) - before if name.startswith("waterfill_rs")}
    heavy = {"waterfill_rs.torch", "waterfill_rs.sglang.balancer", "waterfill_rs.sglang.hash_topk"}
    assert not brought & heavy, brought
    assert set(threading.enumerate()) == threads
    hooked = set(HookRegistry._hooks)
    arguments = "sglang.srt.server_args.ServerArgs."
    assert hooked == {f"{arguments}add_cli_args", f"{arguments}from_cli_args"}, hooked


def run(check):
    try:
        return check() or "ok"
    except BaseException:
        return traceback.format_exc()


def main(report):
    import sglang

    found = {"version": sglang.__version__, "folder": sglang.__path__[0], "checks": {}}
    if os.environ.get("WATERFILL_RS") == "off":
        found["checks"]["off_leaves_sglang_untouched"] = run(untouched)
    else:
        probe = Probe()
        import overlap_probe

        found["checks"] |= overlap_probe.outcomes(probe.seams, probe.resolve)
        probe.start()
        for name, check in probe.checks().items():
            missing = probe.seams.hash_topk is None and "hash_router" in name
            found["checks"][name] = "none" if missing else run(check)
    Path(report).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
