"""The one table of tensor names: what a glm_moe_dsa checkpoint holds, the MTP layer included.

Names are those on disk (Hugging Face layout); the rest of the package uses them as they are. Every Linear weight is
[out, in] and has no bias.
"""

from __future__ import annotations

from typing import NamedTuple

from hetero_glm5.model_config import COMPRESSED_TENSORS, FP8_BLOCK, Int4Scheme, ModelConfig

SCALE_SUFFIX = "_scale_inv"
EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    quantised: bool = False  # FP8 with 128x128 scales in GLM-5-FP8
    dtypes: tuple[str, ...] = ()  # the safetensors types it may have; (): the checkpoint's
    float32: bool = False  # held in fp32 whatever the compute type is


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_prefix(layer: int, expert: int) -> str:
    return f"{layer_prefix(layer)}mlp.experts.{expert}."


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `<name>_scale_inv`: one multiplier for each 128x128 block, the last ones ragged."""
    return tuple(-(-dim // FP8_BLOCK) for dim in shape)


def int4_tensors(name: str, shape: tuple[int, ...], scheme: Int4Scheme) -> dict[str, TensorSpec]:
    """What the INT4 weight `name` [N, K] is stored as; the first holds the codes, eight in an int32, the lowest bits
    first.

    compressed-tensors, format pack-quantized (its PackedQuantizationCompressor): codes along K, N and K themselves.
    GPTQ (AutoGPTQ, GPTQModel; https://danieldk.eu/GPTQ-Checkpoint-Format): everything transposed, zeros packed along N,
    and the group of each column; the last may be missing where it says nothing.
    """
    rows, cols = shape
    groups, floats = -(-cols // scheme.group), ("F16", "BF16", "F32")
    if scheme.kind == COMPRESSED_TENSORS:
        return {
            f"{name}_packed": TensorSpec((rows, -(-cols // 8)), dtypes=("I32",)),
            f"{name}_scale": TensorSpec((rows, groups), dtypes=floats),
            f"{name}_shape": TensorSpec((2,), dtypes=("I64", "I32")),
        }
    prefix = name.removesuffix("weight")
    return {
        f"{prefix}qweight": TensorSpec((-(-cols // 8), rows), dtypes=("I32",)),
        f"{prefix}qzeros": TensorSpec((groups, -(-rows // 8)), dtypes=("I32",)),
        f"{prefix}scales": TensorSpec((groups, rows), dtypes=floats),
        f"{prefix}g_idx": TensorSpec((cols,), dtypes=("I32",)),
    }


def expected_tensors(config: ModelConfig, mtp: bool, routed: bool = True) -> dict[str, TensorSpec]:
    """Every tensor of the model, by name; with the MTP layer's (number num_hidden_layers) if `mtp`, and with those of
    the routed experts if `routed`."""
    hidden = config.hidden_size
    tensors = {
        "model.embed_tokens.weight": TensorSpec((config.vocab_size, hidden)),
        "model.norm.weight": _norm(hidden),
        "lm_head.weight": TensorSpec((config.vocab_size, hidden)),
    }
    for layer in range(config.num_hidden_layers + (1 if mtp else 0)):
        tensors |= layer_tensors(config, layer) | (expert_tensors(config, layer) if routed else {})
    if mtp:
        prefix = layer_prefix(config.num_hidden_layers)
        tensors[f"{prefix}eh_proj.weight"] = TensorSpec((hidden, 2 * hidden))
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}{name}.weight"] = _norm(hidden)
    return tensors


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    """One layer's tensors without its routed experts."""
    c, hidden, prefix = config, config.hidden_size, layer_prefix(layer)
    heads = c.num_attention_heads
    tensors = {
        "input_layernorm.weight": _norm(hidden),
        "post_attention_layernorm.weight": _norm(hidden),
        "self_attn.q_a_proj.weight": TensorSpec((c.q_lora_rank, hidden), True),
        "self_attn.q_a_layernorm.weight": _norm(c.q_lora_rank),
        "self_attn.q_b_proj.weight": TensorSpec((heads * c.qk_head_dim, c.q_lora_rank), True),
        "self_attn.kv_a_proj_with_mqa.weight": TensorSpec((c.latent_dim, hidden), True),
        "self_attn.kv_a_layernorm.weight": _norm(c.kv_lora_rank),
        "self_attn.kv_b_proj.weight": TensorSpec((heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), True),
        "self_attn.o_proj.weight": TensorSpec((hidden, heads * c.v_head_dim), True),
    }
    if config.has_indexer(layer):
        tensors |= {
            "self_attn.indexer.wq_b.weight": TensorSpec((c.index_n_heads * c.index_head_dim, c.q_lora_rank), True),
            "self_attn.indexer.wk.weight": TensorSpec((c.index_head_dim, hidden), True),
            "self_attn.indexer.k_norm.weight": _norm(c.index_head_dim),
            "self_attn.indexer.k_norm.bias": _norm(c.index_head_dim),
            "self_attn.indexer.weights_proj.weight": TensorSpec((c.index_n_heads, hidden)),
        }
    if config.is_sparse(layer):
        # Rounding the router's logits or its bias (values near 7, 1e-3 apart) to bf16 changes the routing.
        tensors["mlp.gate.weight"] = TensorSpec((c.n_routed_experts, hidden), float32=True)
        tensors["mlp.gate.e_score_correction_bias"] = TensorSpec((c.n_routed_experts,), dtypes=("F32",), float32=True)
        tensors |= _mlp("mlp.shared_experts.", hidden, c.moe_intermediate_size * c.n_shared_experts)
    else:
        tensors |= _mlp("mlp.", hidden, c.intermediate_size)
    return {prefix + name: spec for name, spec in tensors.items()}


def expert_tensors(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    """The routed experts of one layer; empty for a dense one."""
    if not config.is_sparse(layer):
        return {}
    tensors: dict[str, TensorSpec] = {}
    for expert in range(config.n_routed_experts):
        tensors |= _mlp(expert_prefix(layer, expert), config.hidden_size, config.moe_intermediate_size)
    return tensors


def _norm(width: int) -> TensorSpec:
    """Norms compute in fp32; holding their few weights so saves a conversion at every use."""
    return TensorSpec((width,), float32=True)


def _mlp(prefix: str, hidden: int, intermediate: int) -> dict[str, TensorSpec]:
    up, down = TensorSpec((intermediate, hidden), True), TensorSpec((hidden, intermediate), True)
    return {f"{prefix}{name}.weight": spec for name, spec in zip(EXPERT_MATRICES, (up, up, down), strict=True)}
