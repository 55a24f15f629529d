"""Tiny checkpoints that vLLM's CPU build can run, saved with what the hub's configs hold and transformers drops."""

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_model

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
}
#: Changes to the tiny models of the transformers tests: vLLM's CPU attention wants heads of 32 and MLA of 576.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SIZES, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4},
    "deepseek_v3": {
        **_SIZES,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
}
#: Fields of the hub's config.json that transformers does not write.
HUB_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}


def save_checkpoint(family: str, folder: Path, seed: int = 0) -> Any:
    """Save a tiny model of `family` for vLLM and return it."""
    model = tiny_model(family, seed, **SHAPES[family])
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | HUB_FIELDS[family]
    path.write_text(json.dumps(config))
    return model


#: Engine arguments that make vLLM's CPU build compute what transformers computes: float32 throughout. Its own rotary
#: kernel turns queries of interleaved layouts wrongly, and its AMX attention works in bfloat16.
ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {
        "attention_backend": "CPU_MLA",
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    },
}
#: Small enough that requests wait for one another and prompts come in chunks.
COMMON_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.15,
}
