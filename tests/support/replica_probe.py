"""The part of ``version_probe.py`` that is about replicas of redundant experts."""

import contextlib
import dataclasses
import importlib
import inspect
import types
from unittest import mock

RANKS, LAYERS, CALLS = 2, 3, 4


class ReplicaProbe:
    """Mixed into ``Probe``, which has the layers, their preparation, and the two ranks."""

    def check_redundant_experts_have_live_replicas_through_a_rebalance(self):
        if not self.seams.redundant:
            return "refused"
        self.two_ranks_reach_the_optimum(self.replica_rank)

    def check_redundant_experts_of_a_draft_model_keep_their_replicas(self):
        if not self.seams.redundant:
            return "refused"
        from waterfill_rs.sglang import preparation, replicas

        layer, config = self.v3_layer(1.0), preparation.Config()
        self.prepare(layer)
        balancers, cpu = [getattr(layer, self.seams.holder)], self.torch.device("cpu")
        with self.placed(self.maps_of(1)):
            for draft in (True, False):
                chosen = replicas.Replicas(self.seams, config, 6, 0, draft=draft)
                assert (chosen.tables(balancers, cpu, None) is None) == draft

    def check_redundant_experts_come_after_primary_replicas(self):
        """In maps that this sglang makes for a server with Waterfill, and in no others."""
        from sglang.srt.eplb.expert_location import ExpertLocationMetadata

        from waterfill_rs import _native
        from waterfill_rs.sglang import primaries_first

        torch, (logical, physical) = self.torch, self.sizes
        # The first experts of each rank are not its primary replicas: those of the other rank are, once more.
        half = torch.arange(logical).view(RANKS, -1)
        more = half[:, : (physical - logical) // RANKS].flip(0)
        mapping = torch.cat([more, half], dim=1).view(1, physical)
        places = [(mapping[0] == expert).nonzero().flatten() for expert in range(logical)]
        padded = torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
        server_args = types.SimpleNamespace(ep_dispatch_algorithm=None)
        known = {"server_args": server_args, "ep_size": RANKS, "physical_to_logical_map": mapping}
        known |= {"logical_to_all_physical_map": padded[None], "moe_ep_rank": 0}
        init = ExpertLocationMetadata._init_raw
        takes = inspect.signature(init).parameters
        given = {name: value for name, value in known.items() if name in takes}
        with self.arguments(**{self.seams.switch: False}):
            assert torch.equal(init(**given).physical_to_logical_map, mapping)
        primaries_first._agreed.clear()  # As in another server.
        with self.arguments(**{self.seams.switch: True}):
            made, against = init(**given), primaries_first.against_hook(self.seams)
        if not self.seams.redundant:
            assert torch.equal(made.physical_to_logical_map, mapping) and against
            return "refused"
        assert not against, against
        expected = torch.tensor([primaries_first.ordered(mapping[0].tolist(), RANKS)])
        table = _native.ReplicaTable(RANKS, expected[0].tolist())
        assert table.first_primaries == logical // RANKS
        assert torch.equal(made.physical_to_logical_map, expected)
        assert torch.equal(made.physical_to_logical_map_cpu, expected)
        for expert, physical in enumerate(made.logical_to_all_physical_map[0].tolist()):
            found = {place for place in physical if place >= 0}
            assert found == set((expected[0] == expert).nonzero().flatten().tolist())

    def check_redundant_experts_are_swapped_in_eplbs_maps(self):
        """Where no order puts primary replicas first, so at EP8 in some layers of these counts, and all hold what they should."""
        if not self.seams.redundant:
            return "refused"
        from waterfill_rs import _native
        from waterfill_rs.sglang import primaries_first

        torch, ranks, (logical, _) = self.torch, 8, self.sizes
        counts = (torch.rand((6, logical), generator=torch.Generator().manual_seed(1)) * 6).exp()
        with self.eplb(ranks) as by_eplb, self.arguments(**{self.seams.switch: True, "nnodes": 1}):
            primaries_first._agreed[:] = [["as sglang makes it"]]
            theirs = by_eplb(counts.long()).physical_to_logical_map.tolist()
            primaries_first._agreed.clear()  # As in another server.
            made = by_eplb(counts.long())
            primaries_first._agreed.clear()
        fits = [_native.ReplicaTable(ranks, primaries_first.ordered(row, ranks)) for row in theirs]
        assert {table.first_primaries for table in fits} == {None, logical // ranks}
        for layer, row in enumerate(made.physical_to_logical_map.tolist()):
            table = _native.ReplicaTable(ranks, row)
            assert table.first_primaries == logical // ranks and sorted(row) == sorted(
                theirs[layer]
            )
            for expert, physical in enumerate(made.logical_to_all_physical_map[layer].tolist()):
                listed = [place for place in physical if place >= 0]
                assert listed and {row[place] for place in listed} == {expert}
                assert len(listed) == row.count(expert)

    @contextlib.contextmanager
    def eplb(self, ranks):
        """This sglang's maps by EPLB of counts ``[layers, L]``, without a model's configuration."""
        from sglang.srt.eplb import expert_location

        logical, physical = self.sizes
        model = types.SimpleNamespace(num_logical_experts=logical, num_groups=None)
        common = {"ep_size": ranks, "num_physical_experts": physical}
        common["model_config_for_expert_location"] = model
        server_args = types.SimpleNamespace(
            device="cpu", nnodes=1, eplb_algorithm="auto", ep_dispatch_algorithm=None
        )
        metadata = expert_location.ExpertLocationMetadata
        first = (
            [server_args]
            if "server_args" in inspect.signature(metadata.init_by_eplb).parameters
            else []
        )
        with contextlib.ExitStack() as patched:
            patched.enter_context(
                mock.patch.object(metadata, "_init_common", staticmethod(lambda *_: common))
            )
            if hasattr(expert_location, "get_device"):
                device = types.SimpleNamespace(device="cpu")
                patched.enter_context(
                    mock.patch.object(expert_location, "get_device", lambda: device)
                )
            yield lambda counts: metadata.init_by_eplb(*first, None, counts)

    def check_redundant_experts_are_spread_where_ids_are_mapped(self):
        """With an algorithm that maps ids sglang's routers reach the experts that were asked for; without one nothing changes."""
        if not self.seams.redundant:
            return "refused"
        from sglang.srt.eplb import expert_location, expert_location_dispatch

        from waterfill_rs.placement.spread import spread
        from waterfill_rs.sglang import primaries_first, spread_places

        torch, (logical, physical) = self.torch, self.sizes
        for algorithm in (None, "static", "dynamic"):
            primaries_first._agreed.clear()  # As in another server.
            spread_places._agreed.clear()
            with self.trivially_placed(
                expert_location, expert_location_dispatch, algorithm
            ) as given:
                made = expert_location.ExpertLocationMetadata.init_trivial(**given)
                row = made.physical_to_logical_map[0].tolist()
                reasons = spread_places.against_hook(self.seams)
                if algorithm is None:
                    assert row == [place % logical for place in range(physical)]
                    assert "give --ep-dispatch-algorithm static" in reasons[0], reasons
                    continue
                assert not reasons, reasons
                assert row == spread(logical, physical - logical, RANKS)
                name = "get_global_expert_location_metadata"
                with mock.patch.object(expert_location_dispatch, name, lambda made=made: made):
                    info = expert_location_dispatch.ExpertLocationDispatchInfo.init_new(0)
                ids = torch.arange(logical).repeat(9, 1)
                found = expert_location_dispatch.topk_ids_logical_to_physical(ids, info)
                assert torch.equal(torch.tensor(row)[found], ids)
                for place in range(physical // RANKS):
                    assert place in made.logical_to_all_physical(0, row[place])
        primaries_first._agreed.clear()

    @contextlib.contextmanager
    def trivially_placed(self, location, dispatch, algorithm):
        """What ``init_trivial`` of this sglang takes, for rank 0 of a server of DeepSeek's model with such an algorithm."""
        from sglang.srt import model_loader

        torch, (logical, physical) = self.torch, self.sizes
        model = type("Model", (), {"__module__": "sglang.srt.models.deepseek_v2"})
        sizes = types.SimpleNamespace(num_layers=1, num_logical_experts=logical, num_groups=None)
        common = {
            "model_config_for_expert_location": sizes,
            "num_physical_experts": physical,
            "base_num_physical_experts": physical,
            "num_local_physical_experts": physical // RANKS,
            "ep_size": RANKS,
        }
        fields = {
            "ep_dispatch_algorithm": algorithm,
            "ep_join_mode": None,
            "ep_size": RANKS,
            "nnodes": 1,
            "device": "cpu",
        }
        arguments = types.SimpleNamespace(**fields)
        here = types.SimpleNamespace(
            moe=types.SimpleNamespace(moe_a2a_backend="deepep", **fields),
            **fields,
        )
        home, _, name = self.seams.backend.rpartition(".")
        backend = types.SimpleNamespace(is_deepep=lambda: True, value="deepep")
        with contextlib.ExitStack() as patches:
            patch = mock.patch.object
            init = staticmethod(lambda *_, **__: common)
            patches.enter_context(patch(location.ExpertLocationMetadata, "_init_common", init))
            patches.enter_context(patch(torch.distributed, "get_rank", lambda *_: 0))
            patches.enter_context(
                patch(model_loader, "get_model_architecture", lambda _: (model, ""))
            )
            patches.enter_context(patch(self.resolve(home), name, lambda: backend))
            modules = [location, dispatch]
            with contextlib.suppress(ImportError):  # 0.5.17 and 0.5.18 import from it at each call.
                modules.append(importlib.import_module("sglang.srt.runtime_context"))
            for module in modules:
                for getter in ("get_exec", "get_device", "get_parallel"):
                    if hasattr(module, getter):
                        patches.enter_context(patch(module, getter, lambda: here))
                for getter in ("get_server_args", "get_global_server_args"):
                    if hasattr(module, getter):
                        patches.enter_context(patch(module, getter, lambda: arguments))
            patches.enter_context(self.arguments(**{self.seams.switch: True}, **fields))
            known = {"server_args": arguments, "moe_ep_rank": 0}
            known["model_config"] = types.SimpleNamespace(quantization="fp8")
            takes = inspect.signature(location.ExpertLocationMetadata.init_trivial).parameters
            yield {one: value for one, value in known.items() if one in takes}

    def replica_rank(self, rank, folder):
        """One of two processes: calls of two layers before and after a rebalance of theirs; rows by rank of each call."""
        with self.placed(self.maps_of(1)) as there:
            layers, exchange = self.join_two(rank, folder)
        assert exchange.replicas is not None
        found, moved = [], 0
        for call in range(CALLS):
            if call == CALLS // 2:
                other = self.metadata_of(self.maps_of(2))
                there.update(other, update_layer_ids=list(range(LAYERS)))
            layer = layers[call % 2]
            mapping = there.physical_to_logical_map[getattr(layer, self.seams.holder).layer_id]
            routed = self.without_waterfill(layer, self.forward_v3)
            given = routed.topk_ids[: 90 + 40 * rank].contiguous()
            weights = routed.topk_weights[: len(given)]
            expand = getattr(layer, self.seams.expands)
            ids = expand(routed._replace(topk_ids=given, topk_weights=weights), len(given)).topk_ids
            chosen = ids[:, :-1] - ids[:, :-1] // (mapping.numel() // RANKS + 1)
            assert self.torch.equal(mapping[chosen.long()], mapping[given.long()])
            moved += int((chosen != given).sum())
            found.append(self.rows_by_rank(rank, len(given), ids))
        assert moved > 0
        self.tell(rank, folder, exchange, found)

    def maps_of(self, seed):
        """``[layers, P]``, each logical expert at least once."""
        torch = self.torch
        torch.manual_seed(seed)
        logical, physical = self.sizes
        more = torch.randint(logical, (physical - logical,))
        return torch.stack(
            [torch.cat([torch.arange(logical), more])[torch.randperm(physical)]] * LAYERS
        )

    @contextlib.contextmanager
    def placed(self, mapping):
        """sglang's map in force, this one."""
        from sglang.srt.eplb import expert_location

        there = self.metadata_of(mapping)
        name = "get_global_expert_location_metadata"
        with mock.patch.object(expert_location, name, lambda: there):
            yield there

    def metadata_of(self, mapping):
        from sglang.srt.eplb.expert_location import ExpertLocationMetadata

        logical, physical = self.sizes
        # More than there are: whatever the map is, all are listed.
        of_all = self.torch.arange(physical).repeat(LAYERS, logical, 1)
        fields = {
            "physical_to_logical_map": mapping.clone(),
            "physical_to_logical_map_cpu": mapping.clone(),
            "logical_to_all_physical_map": of_all,
            "logical_to_all_physical_map_cpu": of_all.clone(),
            "logical_to_all_physical_map_num_valid": of_all[:, :, 0].clone(),
            "ep_size": RANKS,
            "logical_to_rank_dispatch_physical_map": None,
        }
        names = [field.name for field in dataclasses.fields(ExpertLocationMetadata)]
        return ExpertLocationMetadata(**{name: fields[name] for name in names})
