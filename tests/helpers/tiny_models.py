"""Tiny random-weight models of every supported family, with well-spread router scores and strong random biases."""

import inspect
import os
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
EOS = 5
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": PAD,
}
_QWEN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_LINEAR: dict[str, Any] = {
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 3}

#: Families whose text config has a name of its own.
TEXT_CONFIGS = {"qwen3_5_moe": "qwen3_5_moe_text"}

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {
        **_QWEN,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "route_scale": 1.7,
        "global_attn_every_n_layers": 2,
    },
    "axk1": {**_GROUPED, **_MLA},
    "axk2": {**_GROUPED, **_MLA},
    "cohere2_moe": {**_QWEN},
    "deepseek_v2": {**_GROUPED, **_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_GROUPED, **_MLA},
    "deepseek_v32": {**_GROUPED, **_MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
    "dots1": {**_GROUPED},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone_moe": {
        **_GROUPED,
        "num_experts": 16,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "flex_olmo": {**_QWEN},
    "glm4_moe": {**_GROUPED},
    "glm4_moe_lite": {**_GROUPED, **_MLA},
    "glm_moe_dsa": {**_GROUPED, **_MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
    "gpt_oss": {**_LOCAL},
    "granitemoe": {**_LOCAL},
    "granitemoe_swa": {**_LOCAL},
    "granitemoehybrid": {**_LOCAL, "shared_intermediate_size": 16, "layer_types": ["attention"] * 4},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3},
    "hy_v3": {**_QWEN, "num_shared_experts": 1, "first_k_dense_replace": 1, "router_scaling_factor": 2.0},
    "hy_v4": {**_GROUPED, **_MLA},
    "kimi_linear": {**_GROUPED, **_MLA, "num_experts": 16},
    "laguna": {**_QWEN},
    "lfm2_moe": {**_QWEN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "mellum": {**_QWEN},
    "mimo_v2_flash": {**_GROUPED},
    "minimax": {**_LOCAL, "layer_types": ["full_attention"] * 4},
    "minimax_m2": {**_LOCAL},
    "mixtral": {**_LOCAL},
    "nemotron_h": {**_GROUPED},
    "olmoe": {**_QWEN},
    "phimoe": {**_LOCAL, "num_experts_per_tok": 2},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16, "mlp_only_layers": [2]},
    "qwen3_5_moe": {**_QWEN, **_LINEAR},
    "qwen3_moe": {**_QWEN, "mlp_only_layers": [1]},
    "qwen3_next": {**_QWEN, **_LINEAR},
    "solar_open": {**_GROUPED},
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model of `family` in eval mode; router scores spread widely so that near-ties are rare."""
    kind = TEXT_CONFIGS.get(family, family)
    if kind not in CONFIG_MAPPING and "MOESCOPE_NO_SKIPS" not in os.environ:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_COMMON, **FAMILY_CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.08)
            if (
                parameter.ndim == 2
                and any(part in name for part in (".gate.", ".router.", ".wg."))
                and "proj" not in name
            ):
                nn.init.normal_(parameter, std=1.0)
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith(("e_score_correction_bias", "expert_bias", "router.bias")):
                tensor.normal_(std=0.3)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def cache_name(model: Any) -> str:
    """What this version of transformers calls the cache of a forward, among its arguments and its outputs."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in names)
