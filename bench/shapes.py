"""GLM-5's true dimensions, as config.json has them."""

from __future__ import annotations

from typing import Any

from hetero_glm5.demo.configs import COMMON

GLM5: dict[str, Any] = COMMON | {
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "first_k_dense_replace": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 256,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 202752,
    "vocab_size": 154880,
}


def slice_config(*, dense: int, moe: int, experts: int, vocab: int, mtp: bool) -> dict[str, Any]:
    """A few of GLM-5's layers with fewer experts; every layer and every expert keeps its true shape."""
    return GLM5 | {
        "num_hidden_layers": dense + moe,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "vocab_size": vocab,
        "num_nextn_predict_layers": int(mtp),
    }
