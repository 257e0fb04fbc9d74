"""The model that is served: a layer of DeepSeek V4-Flash's shape, as often as asked, and sglang's arguments for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIDDEN, INTERMEDIATE, EXPERT_INTERMEDIATE, VOCABULARY = 4096, 8192, 2048, 32000
DENSE_LAYERS = 1
BESIDE_EXPERTS_GIB = 7.5
"""Of a GPU and engine without graphs: the other weights 1.5, then context, KV cache, buffers of the all-to-all, activations."""
BESIDE_WITH_GRAPHS_GIB = 10.0
"""Of one with graphs, which also has the buffers of DeepEP's low-latency mode. On two H100s an engine of 22 layers, 17.0 GiB
of experts, held 26.4 while it captured its graphs."""

USABLE = 0.95
"""Of a GPU: engines that start together have their peaks together."""


def gib_an_engine(layers: int, experts: int, ranks: int, graphs: bool) -> float:
    """About what an engine takes of each GPU: its experts, the shared one among them, are of one byte a weight."""
    slots = layers * (experts // ranks + 1)
    beside = BESIDE_WITH_GRAPHS_GIB if graphs else BESIDE_EXPERTS_GIB
    return slots * 3 * HIDDEN * EXPERT_INTERMEDIATE / 2**30 + beside


def engines_that_fit(gib: float, layers: int, experts: int, ranks: int, graphs: bool) -> int:
    """On a GPU of ``gib`` GiB, at least one."""
    return max(1, int(USABLE * gib / gib_an_engine(layers, experts, ranks, graphs)))


def has_graphs(phases: Iterable[str]) -> bool:
    """Has an engine for these phases CUDA graphs? One for prefill alone has none."""
    return set(phases) != {"prefill"}


def config(experts: int, top_k: int, layers: int) -> dict[str, Any]:
    """The ``config.json`` of a DeepSeek V3 with ``layers`` MoE layers after a dense one, FP8 in blocks of 128."""
    grouped = experts % 4 == 0 and top_k <= experts // 2
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": EXPERT_INTERMEDIATE,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": DENSE_LAYERS + layers,
        "first_k_dense_replace": DENSE_LAYERS,
        "moe_layer_freq": 1,
        "n_group": 4 if grouped else 1,
        "topk_group": 2 if grouped else 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "q_lora_rank": 1024,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 8192,
        "vocab_size": VOCABULARY,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }


def arguments(
    needs: Mapping[str, Sequence[int]], ranks: int, model: str, waterfill: bool
) -> dict[str, Any]:
    """Arguments of ``sglang.Engine`` for phases; ports come from the driver.

    ``mem_fraction_static`` is no share of the GPU here: several engines are on it, and ``max_total_tokens`` is the limit.

    Args:
        needs: by phase the tokens of a forward and rank; those of ``mixed`` are its chunks. An engine of prefill alone has
            no graphs and DeepEP's normal mode, any other has graphs, and DeepEP's mode is by forward.
    """
    shapes = [_shape(phase, max(tokens), ranks) for phase, tokens in needs.items()]
    common = {
        "model_path": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "tp_size": ranks,
        "dp_size": ranks,
        "enable_dp_attention": True,
        "enable_dp_lm_head": True,
        "moe_dense_tp_size": 1,
        "moe_a2a_backend": "deepep",
        "enable_waterfill": waterfill,
        "load_balance_method": "round_robin",
        "mem_fraction_static": 0.95,
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_radix_cache": True,
        "disable_custom_all_reduce": True,
        "skip_server_warmup": True,
        "context_length": 4096,
        "watchdog_timeout": 300,
        "random_seed": 1,
        "log_level": "info",
    } | {name: max(shape[name] for shape in shapes) for name in shapes[0]}
    if "prefill" in needs:
        common["max_prefill_tokens"] = max(16384, *needs["prefill"])
    if not has_graphs(needs):
        return common | {"deepep_mode": "normal", "disable_cuda_graph": True}
    return common | {
        "deepep_mode": "auto",
        "disable_prefill_cuda_graph": True,
        "cuda_graph_bs_decode": graph_sizes(needs),
        # Without a graph no step may have more tokens than DeepEP's buffers.
        "max_running_requests": max(32, *graph_sizes(needs)) * ranks,
    }


def _shape(phase: str, most: int, ranks: int) -> dict[str, int]:
    """What one phase needs of an engine whose forwards have at most ``most`` tokens a rank."""
    if phase == "prefill":
        return {
            "chunked_prefill_size": most * ranks,
            "max_total_tokens": max(16384, 5 * most),
            "max_running_requests": 256 * ranks,
        }
    if phase == "mixed":
        return {
            "chunked_prefill_size": most * ranks,
            "max_total_tokens": MIXED_CACHE,
            "max_running_requests": max(MIXED_GRAPHS) * ranks,
        }
    return {
        "chunked_prefill_size": max(2048, DECODE_PROMPT * most) * ranks,
        "max_total_tokens": max(8192, 2 * most * (DECODE_PROMPT + DECODE_STEPS)),
        "max_running_requests": max(32, most) * ranks,
    }


def graph_sizes(needs: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens a rank of the steps that have a graph; none for prefill alone."""
    mixed = MIXED_GRAPHS if "mixed" in needs else ()
    return sorted({*needs.get("decode", ()), *mixed})


def output_prompts(needs: Mapping[str, Sequence[int]]) -> int:
    """Prompts a rank whose answers are compared: no step may have more tokens than the largest graph."""
    return min(OUTPUT_PROMPTS, max(graph_sizes(needs), default=OUTPUT_PROMPTS))


def longest(needs: Mapping[str, Sequence[int]]) -> int:
    """The most tokens of a forward and rank, padding included."""
    by_phase = {
        "prefill": lambda tokens: max(tokens),
        "decode": lambda tokens: max(64, DECODE_PROMPT * max(tokens)),
        "mixed": lambda tokens: 2 * max(tokens),
    }
    return max(by_phase[phase](tokens) for phase, tokens in needs.items())


DECODE_PROMPT, DECODE_STEPS = 16, 96
"""Tokens of a decode request's prompt, and tokens that it is given."""
OUTPUT_PROMPTS, OUTPUT_PROMPT, OUTPUT_NEW = 8, 96, 24
"""Prompts a rank whose answers are compared, tokens of each, and tokens that it is given."""
MIXED_CHUNK = 2048
"""``chunked_prefill_size`` a rank: below the longest prompts."""
MIXED_GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MIXED_CACHE = 65536
"""Tokens a rank: 64 requests of mean length."""
