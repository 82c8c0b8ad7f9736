"""What the model is: ModelConfig, read strictly from config.json.

A missing or unsupported value is one sentence that names the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetero_glm5.flags import ConfigError

MODEL_TYPE = "glm_moe_dsa"
DEMO, DEMO_FOLDER = "demo", Path(__file__).parent / "demo" / "model"
FP8_BLOCK = 128
COMPRESSED_TENSORS, GPTQ = "compressed-tensors", "gptq"
INT4_GROUPS = (32, 64, 128)
_READABLE = (
    " FP8 in 128x128 blocks and symmetric INT4 in groups of 32, 64 or 128 (compressed-tensors pack-quantized, or GPTQ "
    "without act-order) can be read: use such a checkpoint, or the BF16 one with hetero-glm5 quantize."
)
LARGEST = 1e9  # of any number in config.json; no dimension or constant comes near
MOST_LAYERS = 1000
MOST_EXPERTS = 10_000


class _Reader:
    """Reads keys of one JSON object; every complaint names the file and the key."""

    def __init__(self, data: Any, where: str, advice: str = ""):
        if not isinstance(data, dict):
            raise ConfigError(f"{where} is {data!r}; it must be a JSON object.{advice}")
        self.data, self.where, self.advice = data, where, advice

    def need(self, kind: type, key: str, minimum: float = 1) -> Any:
        if self.data.get(key) is None:
            raise ConfigError(f'{self.where} has no "{key}"; a {MODEL_TYPE} model needs it. Is the file complete?')
        return self.get(kind, key, None, minimum)

    def get(self, kind: type, key: str, default: Any, minimum: float = 1) -> Any:
        value: Any = self.data.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
            value = float(value)
        if not _is_a(kind, value):
            raise ConfigError(f'{self.where}: "{key}" is {value!r}; it must be {kind.__name__}.')
        if kind in (int, float) and not minimum <= value < LARGEST:  # NaN too
            raise ConfigError(f'{self.where}: "{key}" is {value}; it must be between {minimum} and {LARGEST:g}.')
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The value must be one of `allowed`, the first of which is what a missing key means."""
        if key in self.data:
            self.must(key, *allowed)

    def must(self, key: str, *allowed: Any) -> None:
        """The value must be there, and one of `allowed`."""
        value = self.data.get(key)
        if not any(value == a and type(value) is type(a) for a in allowed):  # 1 is not True, 128.0 is not 128
            names = " or ".join(json.dumps(a) for a in allowed)
            raise ConfigError(f'{self.where}: "{key}" is {json.dumps(value)}; only {names} is supported.{self.advice}')

    def part(self, key: str) -> _Reader:
        """The JSON object under `key`."""
        return _Reader(self.data.get(key), f"{self.where}: {key}", self.advice)

    def schedule(self, key: str, values: Any, length: int, names: tuple[str, ...]) -> tuple[str, ...]:
        if not isinstance(values, list) or len(values) != length or any(v not in names for v in values):
            raise ConfigError(f'{self.where}: "{key}" must list {length} of {", ".join(names)}, one for each layer.')
        return tuple(values)


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class Int4Scheme:
    """How a checkpoint stores INT4 weights: value = (code - 8) * scale, a scale for `group` columns of a row."""

    kind: str  # COMPRESSED_TENSORS or GPTQ
    group: int
    stored_zero: int = 8  # GPTQ: what qzeros holds where 8 is meant; its first version stores one less
    act_order: bool = False  # GPTQ: whether columns may be in another order, which g_idx then tells


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions and constants of a glm_moe_dsa model (GLM-5, 5.1, 5.2, 5.3), under transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_theta: float
    rms_norm_eps: float
    latent_norm_eps: float  # of the q and kv latents; unsettled upstream, so a parameter
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    mlp_layer_types: tuple[str, ...]  # "dense" | "sparse"
    indexer_types: tuple[str, ...]  # "full" | "shared"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5

    @property
    def latent_dim(self) -> int:
        """Width of one cached row: the latent and the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.mlp_layer_types) if kind == "sparse")

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` is MoE; the MTP layer (number num_hidden_layers) is."""
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == "sparse"

    def has_indexer(self, layer: int) -> bool:
        """Whether `layer` computes its own selection; the MTP layer does."""
        return layer >= self.num_hidden_layers or self.indexer_types[layer] == "full"

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Reads FOLDER/config.json, and further end tokens from generation_config.json. Raises ConfigError."""
        path = Path(folder) / "config.json"
        config = cls.parse(read_json(path, f"{folder} is not a checkpoint in Hugging Face format"), str(path))
        path = Path(folder) / "generation_config.json"
        if not path.exists():
            return config
        more = _token_ids(_Reader(read_json(path, f"{path} cannot be read"), str(path)), "eos_token_id")
        return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *more})))

    @classmethod
    def parse(cls, data: dict[str, Any], where: str = "config.json") -> ModelConfig:
        r = _Reader(data, where)
        if data.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f'{where}: "model_type" is {data.get("model_type")!r}; hetero_glm5 serves {MODEL_TYPE} '
                "(GLM-5, 5.1, 5.2 and 5.3) only."
            )
        r.only("hidden_act", "silu")
        r.only("scoring_func", "sigmoid")
        r.only("topk_method", "noaux_tc")
        r.only("attention_bias", False)
        r.only("mlp_bias", False)
        r.only("tie_word_embeddings", False)
        r.only("moe_layer_freq", 1)
        r.only("rope_interleave", True)
        r.only("indexer_rope_interleave", True)
        r.only("n_shared_experts", 1)
        r.only("num_nextn_predict_layers", 0, 1)
        _int4_scheme(r)  # refuses what cannot be read
        layers = r.need(int, "num_hidden_layers")
        eps = r.need(float, "rms_norm_eps", 0)
        config = cls(
            **{name: r.need(int, name) for name in _REQUIRED_INTS},
            num_hidden_layers=layers,
            n_shared_experts=1,
            n_group=r.get(int, "n_group", 1),
            topk_group=r.get(int, "topk_group", 1),
            norm_topk_prob=r.get(bool, "norm_topk_prob", True),
            routed_scaling_factor=r.get(float, "routed_scaling_factor", 1.0, 0),
            rope_theta=_rope_theta(r),
            rms_norm_eps=eps,
            latent_norm_eps=eps,
            eos_token_ids=_token_ids(r, "eos_token_id"),
            num_nextn_predict_layers=r.get(int, "num_nextn_predict_layers", 0, 0),
            mlp_layer_types=_mlp_layer_types(r, layers),
            indexer_types=_indexer_types(r, layers),
        )
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        def refuse(sentence: str) -> None:
            raise ConfigError(f"{where}: {sentence}")

        if self.num_hidden_layers > MOST_LAYERS or self.n_routed_experts > MOST_EXPERTS:
            refuse(
                f"{self.num_hidden_layers} layers of {self.n_routed_experts} experts; at most {MOST_LAYERS} of "
                f"{MOST_EXPERTS} can be served."
            )
        wrong = [i for i in self.eos_token_ids if i >= self.vocab_size]
        if wrong:
            refuse(f"eos_token_id {wrong[0]} lies outside the vocabulary of {self.vocab_size}.")
        if self.qk_rope_head_dim % 2:
            refuse(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number.")
        if self.index_head_dim < self.qk_rope_head_dim:
            refuse(
                f"index_head_dim {self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}; "
                "the indexer rotates that many of its dimensions."
            )
        if self.n_routed_experts % self.n_group:
            refuse(f"n_routed_experts {self.n_routed_experts} is no multiple of n_group {self.n_group}.")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            refuse(f"n_group {self.n_group} leaves one expert for each group; a group's score is the sum of two.")
        if not 1 <= self.topk_group <= self.n_group:
            refuse(f"topk_group {self.topk_group} must lie between 1 and n_group {self.n_group}.")
        choices = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > choices:
            refuse(f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {choices} experts to choose from.")
        if self.indexer_types[0] != "full":
            refuse("the first layer's indexer is shared, but there is no earlier selection to share.")


_REQUIRED_INTS = (
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "vocab_size",
    "max_position_embeddings",
)


def _rope_theta(r: _Reader) -> float:
    """theta sits in rope_parameters (1e6 in GLM-5, 8e6 in 5.2); a top-level rope_theta is the older spelling."""
    if r.data.get("rope_scaling") is not None:
        raise ConfigError(f'{r.where}: "rope_scaling" is set; GLM-5 uses plain rotary embeddings, no scaling.')
    rope = r.data.get("rope_parameters")
    if rope is None:
        return r.need(float, "rope_theta")
    inner = _Reader(rope, f"{r.where}: rope_parameters")
    inner.only("rope_type", "default")
    inner.only("partial_rotary_factor", 1.0)
    unknown = sorted(rope.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ConfigError(f'{inner.where} holds "{unknown[0]}"; only rope_theta and rope_type "default" are supported.')
    return inner.need(float, "rope_theta")


def _token_ids(r: _Reader, key: str) -> tuple[int, ...]:
    value = r.data.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f'{r.where}: "{key}" is {value!r}; it must be a token id or a list of them.')
    return ids


def _mlp_layer_types(r: _Reader, layers: int) -> tuple[str, ...]:
    explicit = r.data.get("mlp_layer_types")
    if explicit is not None:
        return r.schedule("mlp_layer_types", explicit, layers, ("dense", "sparse"))
    dense = min(r.need(int, "first_k_dense_replace", 0), layers)
    return ("dense",) * dense + ("sparse",) * (layers - dense)


def _indexer_types(r: _Reader, layers: int) -> tuple[str, ...]:
    """IndexShare (GLM-5.2): indexer_types > index_topk_pattern > index_topk_freq with index_skip_topk_offset.

    By frequency, layer i is full iff max(i - offset + 1, 0) % freq == 0; freq 1 (GLM-5) makes every layer full.
    """
    explicit = r.data.get("indexer_types")
    if explicit is not None:
        return r.schedule("indexer_types", explicit, layers, ("full", "shared"))
    pattern = r.data.get("index_topk_pattern")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ConfigError(f'{r.where}: "index_topk_pattern" is {pattern!r}; it must be text of F and S.')
        letters = {"F": "full", "S": "shared"}
        return r.schedule("index_topk_pattern", [letters.get(c, c) for c in pattern], layers, ("full", "shared"))
    freq, offset = r.get(int, "index_topk_freq", 1), r.get(int, "index_skip_topk_offset", 2, 0)
    return tuple("full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers))


def int4_scheme(folder: str | Path) -> Int4Scheme | None:
    """How FOLDER/config.json says INT4 weights are stored; None without the file, or if it speaks of none."""
    path = Path(folder) / "config.json"
    return _int4_scheme(_Reader(read_json(path, f"cannot read {path}"), str(path))) if path.exists() else None


def _int4_scheme(r: _Reader) -> Int4Scheme | None:
    """Refuses what is neither FP8 in 128x128 blocks nor symmetric INT4 in groups. Which tensors are quantised, not the
    lists of config.json but the tensors beside each say."""
    if r.data.get("quantization_config") is None:
        return None
    q = _Reader(r.data["quantization_config"], f"{r.where}: quantization_config", _READABLE)
    q.only("quant_method", "fp8", COMPRESSED_TENSORS, GPTQ)
    method = q.data.get("quant_method", "fp8")
    if method == "fp8":
        q.only("fmt", "e4m3")
        q.only("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
        return None
    return _gptq(q) if method == GPTQ else _pack_quantized(q)


def _pack_quantized(q: _Reader) -> Int4Scheme:
    q.must("format", "pack-quantized")
    for key in ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config"):
        q.only(key, None, {})
    groups = q.part("config_groups")
    for key in groups.data or ("group_0",):
        group = groups.part(key)
        group.only("format", None, "pack-quantized")
        group.only("input_activations", None)
        group.only("output_activations", None)
        weights = group.part("weights")
        weights.must("num_bits", 4)
        weights.only("type", "int")
        weights.only("symmetric", True)
        weights.must("strategy", "group")
        weights.must("group_size", *INT4_GROUPS)
        weights.only("actorder", None, False, "weight", "static")  # these leave groups of neighbouring columns
    sizes = sorted({group["weights"]["group_size"] for group in groups.data.values()})
    if len(sizes) > 1:
        raise ConfigError(f'{groups.where}: "group_size" is {sizes[0]} and {sizes[1]}; one is supported.{_READABLE}')
    return Int4Scheme(COMPRESSED_TENSORS, sizes[0])


def _gptq(q: _Reader) -> Int4Scheme:
    q.must("bits", 4)
    q.must("sym", True)
    q.must("group_size", *INT4_GROUPS)
    q.only("pack_dtype", "int32")
    version = "checkpoint_format" if "checkpoint_format" in q.data else "format"
    q.only(version, "gptq", "gptq_v2")
    zero = 8 if q.data.get(version) == "gptq_v2" else 7
    return Int4Scheme(GPTQ, q.data["group_size"], zero, act_order=q.get(bool, "desc_act", False))


def checkpoint_folder(model: str) -> str:
    """The folder that a model's name means: "demo" is the small trained model that this package ships, wherever the
    command runs (a folder of that name is ./demo); anything else is a folder. Raises ConfigError."""
    if model != DEMO:
        return model
    if not (DEMO_FOLDER / "config.json").is_file():
        raise ConfigError(
            f"the demo model is not in this installation: {DEMO_FOLDER} has no config.json. Install the package again "
            "with its data, or give a checkpoint folder."
        )
    return str(DEMO_FOLDER)


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError beginning with `otherwise` when there is none."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{otherwise}: {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not a JSON object.")
    return data
