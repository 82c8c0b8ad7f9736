"""Steps of few rows on CPU cores, above all decoding: a layer is four calls into _C instead of some forty operations.

Computes what attention.py, indexer.py and moe.py say, on the host pool's threads, from the same matrices where they
lie. Sums and the stream x between the layers are fp32, whatever the model's type. A row's result does not depend on the
other rows of the step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.model.attention import Attention
from hetero_glm5.model.host_step import HostStep, most_few_rows, stored
from hetero_glm5.model.indexer import K_NORM_EPS
from hetero_glm5.model.layers import Layer
from hetero_glm5.model.moe import Experts, MoE
from hetero_glm5.model.state import Cache, Rows
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops.reference import RMSNorm
from hetero_glm5.weights.quantize import host_array


class FewRows:
    """What the layers of a model and its MTP layer share. pool: the threads, experts.HostPool.handle. One thread at a
    time may use it."""

    def __init__(self, config: ModelConfig, pool: _C.HostPool):
        self.config = config
        self._space = _C.DenseWorkspace(pool)

    def takes(self, rows: int) -> bool:
        """Whether a step of so many rows is one of few."""
        return rows <= most_few_rows(self.config)

    def step(self, rows: Rows, cache: Cache) -> HostStep:
        """Of few rows or many."""
        return HostStep(self._space, rows, cache, self.config)

    def layer(self, layer: Layer) -> FewLayer:
        return FewLayer(self.config, self._space, layer)

    def product(self, matrix: Tensor) -> RowFunction:
        """W [rows, cols] fp32 or bf16: x [T, cols] → W x, fp32 [T, rows]."""
        return RowFunction(_C.DenseProduct(self._space, host_array("w", matrix)), len(matrix))

    def norm(self, norm: RMSNorm) -> RowFunction:
        """x [T, width] → fp32 of the same shape."""
        return RowFunction(_C.DenseNorm(self._space, host_array("weight", norm.weight), norm.eps), len(norm.weight))


class RowFunction:
    """A function of rows that _C computes, with results of `width` values."""

    def __init__(self, function: _C.DenseProduct | _C.DenseNorm, width: int):
        self._c, self.width = function, width

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.width)
        self._c.forward(x.float().contiguous().numpy(), y.numpy())
        return y


class FewLayer:
    """A layer's x += Attention(RMS(x)); x += FFN(RMS(x)), in place on x fp32 [T, hidden]. Of rows in no segment only
    the keys are cached."""

    def __init__(self, config: ModelConfig, space: _C.DenseWorkspace, layer: Layer):
        self.number, self._topk = layer.attention.layer, config.num_experts_per_tok
        self._indexes = layer.attention.indexer is not None
        self._attention = _C.DenseAttention(space, *_attention_parts(config, layer))
        mlp = layer.mlp
        dense = mlp.shared if isinstance(mlp, MoE) else mlp
        norm = layer.post_norm
        arrays = host_array("norm", norm.weight), norm.eps, host_array("gate_up", dense.gate_up)
        self._mlp = _C.DenseFeedForward(space, *arrays, host_array("down", dense.down))
        self.part, self._type = dense.part, dense.down.dtype
        self._routes = isinstance(mlp, MoE)
        if isinstance(mlp, MoE):
            self._mlp.set_router(
                host_array("gate.weight", mlp.gate),
                host_array("e_score_correction_bias", mlp.bias),
                self._topk,
                (config.n_group, config.topk_group),
                config.norm_topk_prob,
                config.routed_scaling_factor,
            )

    def __call__(self, x: Tensor, step: HostStep, experts: Experts) -> None:
        self.attend(x, step)
        clock, rows = step.rows.clock, step.rows.attending
        stream, normed = x.numpy()[:rows], torch.empty(rows, x.shape[1])
        if not self._routes:
            with clock(self.part):
                self._mlp.begin(stream, normed.numpy(), None, None)
                self._mlp.end(stream, None)
            return
        ids, weights = torch.empty(rows, self._topk, dtype=torch.int64), torch.empty(rows, self._topk)
        with clock(self.part):  # the router's part too
            self._mlp.begin(stream, normed.numpy(), ids.numpy(), weights.numpy())
        routed = experts(self.number, normed.to(self._type), ids, weights, clock)()
        with clock(self.part):
            self._mlp.end(stream, routed.numpy())

    def attend(self, x: Tensor, step: HostStep) -> None:
        """x += Attention(RMS(x)) of the rows in segments; caches the keys of all."""
        with step.rows.clock("attention"):
            self._attention.forward(step.c, x.numpy(), *self._caches(step))

    def _caches(self, step: HostStep) -> tuple[np.ndarray, np.ndarray | None]:
        index = step.cache.index[self.number] if self._indexes else None
        return stored(step.cache.latent[self.number]), None if index is None else stored(index)


def _attention_parts(c: ModelConfig, layer: Layer) -> tuple[dict[str, float], dict[str, np.ndarray | None]]:
    """Sizes and arrays, as _C.DenseAttention names them."""
    attention: Attention = layer.attention
    indexer = attention.indexer
    sizes = {
        "hidden": c.hidden_size,
        "heads": c.num_attention_heads,
        "nope": c.qk_nope_head_dim,
        "rope": c.qk_rope_head_dim,
        "v": c.v_head_dim,
        "latent": c.kv_lora_rank,
        "q_lora": c.q_lora_rank,
        "index_heads": c.index_n_heads if indexer else 0,
        "index_dim": c.index_head_dim if indexer else 0,
        "norm_eps": layer.input_norm.eps,
        "latent_eps": c.latent_norm_eps,
        "index_eps": K_NORM_EPS,
        "scale": c.softmax_scale,
    }
    tensors = {
        "input_norm": layer.input_norm.weight,
        "q_norm": attention.q_norm.weight,
        "kv_norm": attention.kv_norm.weight,
        "index_norm": indexer and indexer.k_norm[0],
        "index_bias": indexer and indexer.k_norm[1],
        "down": attention.down,
        "q_b": attention.q_b,
        "w_uk": attention.w_uk.flatten(0, 1),
        "w_uv": attention.w_uv.flatten(0, 1),
        "o": attention.o,
        "index_q": indexer and indexer.wq_b,
    }
    return sizes, {name: None if tensor is None else host_array(name, tensor) for name, tensor in tensors.items()}
