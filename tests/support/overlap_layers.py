"""Real MoE layers of any sglang on the CPU, for one rank of two, without DeepEP.

DeepEP needs a GPU. ``Experts`` stands in for the experts' call and for their dispatcher: it computes the experts of each
row from the layers' own stacked weights. ``clamped`` stands in for the activation of DeepSeek V4, and ``gated`` for its
gate's product, which are CUDA kernels. All else is sglang's: groups, router, weight loaders, dense MLP.
"""

import contextlib
import functools
import inspect
import logging
import types
from unittest import mock

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

RANKS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 16, 4, 64, 32, 40
LIMIT = 0.5
"""Of the clamped activation: low enough that it takes part."""
V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
}
V4 = V3 | {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 1,
    "swiglu_limit": LIMIT,
}


class Ranks:
    """This process as rank ``rank`` of two: sglang's context, and real groups over gloo.

    Args:
        folder: where both ranks meet.
    """

    def __init__(self, seams, resolve, rank, folder):
        self.seams, self.resolve, self.rank = seams, resolve, rank
        self.fields = {
            seams.switch: True,
            "moe_a2a_backend": "deepep",
            "tp_size": RANKS,
            "ep_size": RANKS,
            "device": "cpu",
        }
        self.arguments = None
        self._scopes = contextlib.ExitStack()
        self._scopes.enter_context(self.publish())
        with contextlib.suppress(ImportError):
            from sglang.srt.runtime_context import get_parallel

            self._scopes.enter_context(get_parallel().override(**self._places()))
        self._meet(folder)
        self._stand_in()
        from sglang.srt.layers.dp_attention import set_is_extend_in_batch

        set_is_extend_in_batch(False)  # As sglang does for a batch of decode.

    def _places(self):
        own = dict.fromkeys(("tp_rank", "moe_ep_rank", "attn_tp_rank"), self.rank)
        return own | dict.fromkeys(("attn_cp_rank", "pp_rank", "moe_tp_rank"), 0)

    @contextlib.contextmanager
    def asked(self, **fields):
        """As if the operator had given these flags, at the place where we read them."""
        module, _, name = self.seams.arguments.rpartition(".")
        read = self.resolve(self.seams.arguments)
        given = type("Given", (), fields | {"__getattr__": lambda _, name: getattr(read(), name)})()
        with mock.patch.object(self.resolve(module), name, lambda: given):
            yield

    @contextlib.contextmanager
    def publish(self, fused=True):
        """Arguments in force, and where shared experts are: as a model's builder publishes them."""
        fields = self.fields | {"disable_shared_experts_fusion": not fused}
        with contextlib.ExitStack() as stack:
            try:
                from sglang.srt.runtime_context import get_context

                override = get_context().override_server_args
            except (ImportError, AttributeError):  # Before 0.5.16.
                stack.enter_context(self._old_arguments(fields))
            else:
                self.arguments = stack.enter_context(override(model_path="dummy", **fields))
            with contextlib.suppress(ImportError):
                from sglang.srt.configs.shared_experts import SharedExpertsConfig
                from sglang.srt.runtime_context import get_model

                layout = SharedExpertsConfig(not fused, int(fused), fused)
                stack.enter_context(get_model().override(shared_experts=layout))
            with contextlib.suppress(ImportError, AttributeError):  # 0.5.15 alone.
                from sglang.srt.runtime_context import get_flags

                flags = get_flags()
                flag = mock.patch.object(flags, "disable_shared_experts_fusion", not fused)
                stack.enter_context(flag)
            self._initialize_moe()
            yield

    @contextlib.contextmanager
    def _old_arguments(self, fields):
        from sglang.srt import server_args

        before, publish = self.arguments, server_args.set_global_server_args_for_scheduler
        self.arguments = object.__new__(server_args.ServerArgs)
        vars(self.arguments).update(fields, model_path="dummy")
        publish(self.arguments)
        yield
        self.arguments = before
        publish(before)

    def _initialize_moe(self):
        from sglang.srt.layers.moe.utils import initialize_moe_config

        takes = inspect.signature(initialize_moe_config).parameters
        initialize_moe_config(*[self.resolve(self.seams.arguments)()][: len(takes)])

    def build(self, config, layers, dtype=torch.bfloat16, *, fused=True):
        """A model with Waterfill on, or one whose shared experts were never fused."""
        with self.publish(fused):
            return Model(self, config, layers, dtype)

    def build_fp8(self, config, quantization):
        """One layer without weights. Its constructor asks whether DeepGEMM is there, and nothing of DeepGEMM."""
        from sglang.srt.layers import deep_gemm_wrapper

        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        there = mock.patch.object(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True)
        try:
            with self.publish(), there:
                return self.resolve(self.seams.moe)(
                    PretrainedConfig(**config),
                    layer_id=0,
                    prefix="layers.0.mlp",
                    quant_config=quantization,
                )
        finally:
            torch.set_default_dtype(before)

    def prepare(self, model, dtype=torch.bfloat16):
        """As sglang does once a model is loaded. Returns what we log of it."""
        prepare = self.resolve(self.seams.prepare)
        known = {
            "model": model,
            "model_config": types.SimpleNamespace(
                hf_config=types.SimpleNamespace(n_routed_experts=EXPERTS), dtype=dtype
            ),
            "server_args": self.arguments,
            "moe_ep_size": RANKS,
            "moe_ep_rank": self.rank,
        }
        takes = inspect.signature(prepare).parameters
        with logged() as lines, self.publish():
            if "self" in takes:
                prepare(types.SimpleNamespace(**known))
            else:
                prepare(**{name: value for name, value in known.items() if name in takes})
        return "\n".join(lines)

    def balancer(self, moe):
        return getattr(moe.topk, self.seams.holder)

    def _meet(self, folder):
        from sglang.srt.distributed import parallel_state
        from sglang.srt.distributed.device_communicators import pynccl

        pynccl.PyNcclCommunicator = mock.MagicMock()  # There is no NCCL here, and gloo does.
        parallel_state.init_distributed_environment(
            world_size=RANKS,
            rank=self.rank,
            local_rank=self.rank,
            distributed_init_method=f"file://{folder}/groups",
            backend="gloo",
        )
        widths = {
            "tensor_model_parallel_size": RANKS,
            "expert_model_parallel_size": RANKS,
        }
        make = parallel_state.initialize_model_parallel
        takes = inspect.signature(make).parameters
        make(**{name: width for name, width in widths.items() if name in takes})

    def _stand_in(self):
        from sglang.srt.layers.moe.fused_moe_triton import layer

        layer.create_moe_dispatcher = lambda *_, **__: None
        deepseek = self.resolve(self.seams.moe.rpartition(".")[0])
        deepseek.silu_and_mul_clamp = clamped
        # No expert has moved: where a layer asks for that itself, nobody published it here.
        nowhere = types.SimpleNamespace(init_new=lambda *_, **__: None)
        deepseek.ExpertLocationDispatchInfo = nowhere
        torch._dynamo.config.disable = (
            True  # Routers on the CPU would be compiled, seconds in each process.
        )


def clamped(gate_up, out, limit):
    """As the kernel's definition: silu of a gate of ``limit`` at most, times an up within it."""
    out.copy_(activated(gate_up, limit))


def gated(weight, hidden_states, *_, **__):
    return torch.nn.functional.linear(hidden_states.float(), weight.float())


def activated(gate_up, limit):
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


class Experts:
    """What DeepEP and the grouped kernels give for a layer, from the stacked weights of both ranks.

    Ids of physical slots, e + 1 a rank where the shared expert is fused, e where it is not. ``seen``: ids, weights.
    """

    def __init__(self, experts, limit):
        self._experts, self._limit = experts, limit
        self.seen = []
        self.gather()
        experts.forward = self.forward
        self.dispatcher = experts.dispatcher = types.SimpleNamespace(
            dispatch_a=self._dispatch_a,
            dispatch_b=lambda **_: self._given,
            combine_a=self._combine_a,
            combine_b=lambda **_: self._combined,
        )
        experts.run_moe_core = lambda dispatch_output: self.forward(*dispatch_output)

    def gather(self):
        """All ranks' weights as they are now, ``[slots of all ranks, ...]``."""
        self._w13, self._w2 = (
            torch.cat(gathered(getattr(self._experts, name).data))
            for name in ("w13_weight", "w2_weight")
        )

    def forward(self, hidden_states, topk_output):
        ids, weights = topk_output.topk_ids, topk_output.topk_weights.float()
        self.seen.append((ids, topk_output.topk_weights))
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for row, column in (ids >= 0).nonzero().tolist():
            slot = ids[row, column]
            gate_up = torch.nn.functional.linear(hidden_states[row : row + 1], self._w13[slot])
            down = torch.nn.functional.linear(activated(gate_up, self._limit), self._w2[slot])
            out[row] += weights[row, column] * down[0].float()
        return out.to(hidden_states.dtype)

    def _dispatch_a(self, hidden_states, topk_output, **_):
        self._given = hidden_states, topk_output

    def _combine_a(self, combine_input, **_):
        self._combined = combine_input


@contextlib.contextmanager
def logged():
    """The lines that our package logs meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("waterfill_rs")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def batch(rows, **fields):
    """What a layer reads of sglang's ``ForwardBatch``."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    ids = torch.arange(rows) % VOCABULARY
    known = dict.fromkeys(("num_token_non_padded", "attn_cp_metadata"))
    known |= {"input_ids": ids, "forward_mode": ForwardMode.DECODE}
    known["moe_num_token_non_padded"] = lambda: None
    return types.SimpleNamespace(**known | fields)


class Model(torch.nn.Module):
    """As many MoE layers as a test wants, named as in a model: ``layers.0.mlp``."""

    def __init__(self, ranks, config, layers, dtype):
        super().__init__()
        moe = ranks.resolve(ranks.seams.moe)
        v4 = {"is_deepseek_v4": True} if config["model_type"] == "deepseek_v4" else {}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.layers = torch.nn.ModuleList(
                _Layer(
                    moe(
                        PretrainedConfig(**config),
                        layer_id=layer,
                        prefix=f"layers.{layer}.mlp",
                        **v4,
                    )
                )
                for layer in range(layers)
            )
        finally:
            torch.set_default_dtype(before)
        for index, moe in enumerate(self.moes):
            load(moe, index)
            moe.__dict__["stand_in"] = Experts(moe.experts, config.get("swiglu_limit"))
            if not moe.is_hash:
                moe.topk.forward = moe.topk.forward_native
            if v4:
                moe.gate.forward = functools.partial(gated, moe.gate.weight)
            if v4 and not moe.is_hash:
                # Before 0.5.16 a router on the CPU knows no other.
                moe.topk.topk_config.scoring_func = "sigmoid"

    @property
    def moes(self):
        return [layer.mlp for layer in self.layers]


class _Layer(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp


def checkpoint(seed):
    """One layer's weights as in a checkpoint: experts by their id, the shared one last."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale):
        return torch.randn(*shape, generator=random) * scale

    experts = [
        {
            "w1": normal(INTERMEDIATE, HIDDEN, scale=0.2),
            "w3": normal(INTERMEDIATE, HIDDEN, scale=0.2),
            "w2": normal(HIDDEN, INTERMEDIATE, scale=0.2),
        }
        for _ in range(EXPERTS + 1)
    ]
    return normal(EXPERTS, HIDDEN, scale=0.2), normal(EXPERTS, scale=0.05), experts


def load(moe, seed):
    """Through the layer's own loaders; the shared expert into its slot, or into its MLP."""
    gate, bias, experts = checkpoint(seed)
    moe.gate.weight.data.copy_(gate)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.data.copy_(bias)
    if moe.is_hash:
        random = torch.Generator().manual_seed(seed)
        table = torch.stack(
            [torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(VOCABULARY)]
        )
        moe.topk.tid2eid.data.copy_(table.to(moe.topk.tid2eid.dtype))
    fused = moe.num_fused_shared_experts
    for expert, weights in enumerate(experts[: EXPERTS + fused]):
        for shard, weight in weights.items():
            name = "w2_weight" if shard == "w2" else "w13_weight"
            parameter = getattr(moe.experts, name)
            parameter.weight_loader(parameter, weight, name, shard_id=shard, expert_id=expert)
    if not fused:
        shared = moe.shared_experts
        for place, shard in enumerate(("w1", "w3")):
            parameter = shared.gate_up_proj.weight
            parameter.weight_loader(parameter, experts[-1][shard], place)
        parameter = shared.down_proj.weight
        parameter.weight_loader(parameter, experts[-1]["w2"])
    for module in moe.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading") and module is not moe.gate:
            method.process_weights_after_loading(module)
