"""config.json contents for random checkpoints and the demo model: GLM-5's fields with small dimensions."""

from __future__ import annotations

from typing import Any

COMMON = {  # what does not depend on the size
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "num_nextn_predict_layers": 1,
}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """The test model: it selects positions early (index_topk 16) and is held against the oracle in fp32."""
    return COMMON | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 96,
        "qk_rope_head_dim": 32,
        "qk_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "index_n_heads": 32,
        "index_head_dim": 64,
        "index_topk": 16,
        "max_position_embeddings": 4096,
        "vocab_size": 512,
        **overrides,
    }


def serve_config() -> dict[str, Any]:
    """A random checkpoint of about 10 MB in BF16, with enough experts for the GLM-5 card's launch command."""
    return COMMON | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "qk_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 256,
        "max_position_embeddings": 16384,
        "vocab_size": 1024,
    }


def demo_config() -> dict[str, Any]:
    """The trained model that the package holds. Smaller angles (rope_theta) tell neighbours apart in 8 rotary pairs;
    rms_norm_eps is what transformers uses for the latents whatever the file says, so that both agree."""
    return COMMON | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "qk_head_dim": 48,
        "v_head_dim": 48,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 512,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
        "rms_norm_eps": 1e-6,
        "vocab_size": 3072,
    }
