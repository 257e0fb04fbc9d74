"""The scheduler process of sglang on the CPU, with a tiny DeepSeek V3 of random weights: ``start(FOLDER, FLAG...)``.

Without a GPU the real one ends where it builds the model: at the rotary embedding's kernel, which is CUDA's or vLLM's,
then at DeepEP, which asks for a CUDA device. These two are stood in for, here and in no other way than as a module and
a function; all else, from the flags to the token, is sglang's own.
"""

import json
import sys
import types
from pathlib import Path

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_scaling": {
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
FLAGS = ["--device", "cpu", "--load-format", "dummy", "--skip-tokenizer-init"]
FLAGS += ["--context-length", "128", "--max-total-tokens", "512", "--max-running-requests", "4"]


def start(folder, *flags):
    """The scheduler, its model loaded and prepared."""
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import PortArgs, prepare_server_args

    arguments = prepare_server_args(["--model-path", folder, *FLAGS, *flags])
    _stand_in()
    from sglang.srt.managers.scheduler import Scheduler, SpawnRanks, configure_scheduler_process
    from sglang.srt.runtime_context import publish

    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0))
    configure_scheduler_process(arguments, 0)
    return Scheduler(arguments, PortArgs.init_new(arguments))


def _stand_in():
    vllm, operators = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    vllm.__path__, operators.rotary_embedding = [], None
    sys.modules |= {vllm.__name__: vllm, operators.__name__: operators}
    from sglang.srt.layers.moe.fused_moe_triton import layer
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    layer.create_moe_dispatcher = lambda config, *_, **__: StandardDispatcher(config)
