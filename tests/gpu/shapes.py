"""Configs of the three families for vLLM with dummy weights: small ones for exactness, real shapes for measurements."""

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    # a token in sixteen ends a request, so that requests end at many lengths
    "eos_token_id": list(range(16)),
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}

FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
#: int4 as published for Qwen3-MoE: GPTQ, groups of 128.
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "dynamic": {r"-:.*mlp\.gate$": {}, r"-:.*self_attn.*": {}, r"-:.*mlp\.(gate_up|gate|up|down)_proj$": {}},
}

SMALL: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [2],
        "use_sliding_window": False,
    },
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 512,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 256,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "rope_interleave": True,
    },
    "minimax": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1] * 6,
        "shared_intermediate_size": 0,
        "mlp_intermediate_size": 512,
        "use_mtp": False,
    },
}

#: Real shapes; layers of the two larger models are cut to what one GPU holds.
REAL: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **SMALL["qwen3"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "eos_token_id": 151645,
    },
    "deepseek-v3": {
        **SMALL["deepseek"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "eos_token_id": 1,
    },
    "minimax-m2": {
        **SMALL["minimax"],
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 14,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "attn_type_list": [1] * 14,
        "vocab_size": 200064,
        "rope_theta": 5000000.0,
        "eos_token_id": 200020,
    },
}


def write_config(folder: Path, shape: dict[str, Any], **changes: Any) -> str:
    """Write a config.json and return its folder, for `load_format="dummy"`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_COMMON, **shape, **changes}))
    return str(folder)


def trace_about(engine: Any, domains: int, prompts: int, *, weights: bool) -> Any:
    """What a trace of an engine's batch is of."""
    from moescope.profiler.profile import RunInfo
    from moescope.profiler.trace import TraceAbout

    run = RunInfo("run", "2026-01-01T00:00:00", engine.info, 0, prompts, "00", {"seed": 0}, complete=False)
    return TraceAbout(engine.model, tuple(f"{i:02}" for i in range(domains)), run, "0", weights)
