"""The part of ``version_probe.py`` that is about the backend megamoe."""

import contextlib
import sys
import types
from unittest import mock

EXPERTS, TOP_K = 56, 6


class MegaMoeProbe:
    """Mixed into ``Probe``, which has the layers, their preparation, and the two ranks."""

    def check_mega_moe_rank_without_rows_posts(self):
        if not self.seams.mega_moe:
            return self.mega_moe_is_refused()
        with self.mega_moe() as reached:
            for router in (self.v3_layer(1.0), self.hash_layer()):
                self.prepare(router)
                exchange = getattr(router, self.seams.holder).exchange
                for calls, rows in enumerate((0, 5, 0), start=1):
                    self.forward_mega(router, rows)
                    assert reached[-1][0].shape == reached[-1][1].shape == (rows, TOP_K + 1)
                    assert exchange.tally()["calls"] == calls
                empty, given = self.idle(router), reached[-2]
                assert empty.topk_ids.dtype == given[0].dtype
                assert empty.topk_weights.dtype == given[1].dtype

    def check_mega_moe_rank_without_rows_of_others_is_left_alone(self):
        if not self.seams.mega_moe:
            return self.mega_moe_is_refused()
        layer = self.v3_layer(1.0)
        with self.arguments(elastic_ep_backend="mooncake"):
            self.prepare(layer)
        self.is_sglangs_own(layer)
        with self.mega_moe():
            layer.empty_topk_output = None  # Called, it would raise.
            self.forward_mega(layer, 0)

    def check_mega_moe_two_ranks_stay_in_step(self):
        if not self.seams.mega_moe:
            return self.mega_moe_is_refused()
        self.two_ranks_reach_the_optimum(self.mega_rank)

    def mega_moe_is_refused(self):
        with self.mega_moe():
            layer = self.v3_layer(1.0)
            self.prepare(layer)
        self.is_sglangs_own(layer)
        return "refused"

    @contextlib.contextmanager
    def mega_moe(self):
        """The backend megamoe without its kernels: gives the ids and weights that reached them, call by call."""
        from sglang.srt.layers.moe import mega_moe, topk, utils

        reached = []

        def pre_dispatch(_, ids, weights, *__, **___):
            reached.append((ids, weights))

        nowhere = types.SimpleNamespace(init_new=lambda *_, **__: None)
        kernels = types.ModuleType("deep_gemm")
        kernels.fp8_fp4_mega_moe = lambda *_, **__: None
        group = types.SimpleNamespace(device_group=None)
        module, _, name = self.seams.group.rpartition(".")
        with contextlib.ExitStack() as stack:
            for home, attribute, value in (
                (utils, "get_moe_a2a_backend", lambda: utils.MoeA2ABackend("megamoe")),
                (self.resolve(module), name, lambda: group),
                (topk, "get_tp_group", lambda: None),
                (mega_moe, "ExpertLocationDispatchInfo", nowhere),
                (mega_moe, "mega_moe_pre_dispatch", pre_dispatch),
                (mega_moe, "_get_mega_moe_symm_buffer", lambda *_, **__: mock.MagicMock()),
                (mega_moe, "_configure_mega_moe_deep_gemm_num_sms", contextlib.nullcontext),
            ):
                stack.enter_context(mock.patch.object(home, attribute, value, create=True))
            stack.enter_context(mock.patch.dict(sys.modules, deep_gemm=kernels))
            with contextlib.suppress(ImportError, ValueError):
                from sglang.srt.runtime_context import get_parallel

                stack.enter_context(get_parallel().override(moe_ep_group=group, tp_group=None))
            yield reached

    def forward_mega(self, router, rows):
        """sglang's own path of one layer, ``rows`` tokens, from where its MoE layer enters it."""
        from sglang.srt.layers.moe.topk import TopK

        torch = self.torch
        torch.manual_seed(rows)
        logits, ids = torch.randn(rows, EXPERTS), torch.randint(0, 40, (rows,))
        if isinstance(router, TopK):
            router.forward = router.forward_native
        experts = mock.MagicMock(_mega_moe_nvfp4=False, _mega_moe_w4a4=False)
        moe = types.SimpleNamespace(
            topk=router,
            layer_id=2,
            is_hash=not isinstance(router, TopK),
            gate=lambda *_, **__: logits,
            experts=experts,
            config=types.SimpleNamespace(
                hidden_size=8, num_experts_per_tok=TOP_K, moe_intermediate_size=8
            ),
            alt_stream=None,
            num_fused_shared_experts=1,
            mega_shared_l1_weights=None,
            mega_shared_l2_weights=None,
            routed_scaling_factor=1.0,
            routed_scaling_factor_fused_in_topk=True,
            _forward_shared_experts=lambda _: None,
        )
        self.resolve(self.seams.mega_moe)(moe, torch.zeros(rows, 8), None, input_ids_global=ids)

    def mega_rank(self, rank, folder):
        """As ``live_rank``, and each rank has no rows in some calls, rank 1 none in the first."""
        layers, exchange = self.join_two(rank, folder)
        rows = ((7, 0), (0, 30), (40, 20), (0, 0), (15, 0), (25, 35))
        with self.mega_moe() as reached:
            found = []
            for call, tokens in enumerate(rows):
                self.forward_mega(layers[call % 2], tokens[rank])
                found.append(self.rows_by_rank(rank, tokens[rank], reached[-1][0]))
        self.tell(rank, folder, exchange, found)
