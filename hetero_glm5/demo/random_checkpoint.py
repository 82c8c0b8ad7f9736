"""Writes a checkpoint of GLM-5's architecture with random weights, in Hugging Face format.

    python -m hetero_glm5.demo.random_checkpoint OUT [--fp8] [--seed N] [--config FILE]

Memory holds one tensor at a time: a safetensors file is a header that lists every tensor's byte range, then the bytes,
and the header is known before the first weight is drawn. A tensor's content depends on the seed and its name only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hetero_glm5.core import UserError
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.configs import serve_config, tiny_config
from hetero_glm5.demo.tokenizer import EOS, PAD, build_tokenizer, tokenizer_config
from hetero_glm5.model_config import FP8_BLOCK, ModelConfig, read_json
from hetero_glm5.weights.checkpoint import DTYPES as CODE_DTYPES
from hetero_glm5.weights.names import SCALE_SUFFIX, TensorSpec, expected_tensors, scale_shape
from hetero_glm5.weights.quantize import quantize_fp8

__all__ = ["serve_config", "tiny_config", "write_checkpoint"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CODES = {dtype: code for code, dtype in CODE_DTYPES.items()}
SHARD_BYTES = 512 * 2**20
DRAWN = 1_000_003  # numbers drawn for one tensor; a larger one repeats them. A prime, so that no two rows are alike

Stored = tuple[str, tuple[int, ...], torch.dtype]  # name, shape and type of one tensor in a file


def write_checkpoint(
    folder: str | Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes weights, config.json, tokenizer and chat template into `folder`, which must be empty or absent.

    `config` is the content of config.json; dtype, token ids and quantization_config are filled in here. With `fp8` the
    Linear weights are E4M3 with one multiplier for each 128x128 block, as in GLM-5-FP8. Raises UserError.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder. Give a new one; nothing is overwritten.")
    model = ModelConfig.parse(config)
    tokenizer = build_tokenizer(model.vocab_size)
    config = config | {
        "dtype": dtype,
        "eos_token_id": [tokenizer.token_to_id(token) for token in EOS],
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    config.pop("quantization_config", None)
    specs = expected_tensors(model, mtp=model.num_nextn_predict_layers == 1)
    if fp8:
        config["quantization_config"] = _quantization_config(specs)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, specs, Draw(seed, DTYPES[dtype], fp8), shard_bytes)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model.max_position_embeddings))
    generation = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation | {"temperature": 1.0, "top_p": 0.95, "do_sample": True})
    _write_json(folder / "config.json", config)
    return folder


class Draw:
    """Random tensors: `draw(name, spec)` is a pure function of the seed and its arguments."""

    def __init__(self, seed: int, dtype: torch.dtype, fp8: bool):
        self.seed, self.dtype, self.fp8 = seed, dtype, fp8

    def stored(self, name: str, spec: TensorSpec) -> list[Stored]:
        """What `draw` will return for `name`, as it lies in the file: the tensor, and its scales if it is FP8."""
        if self.fp8 and spec.quantised:
            scale = (name + SCALE_SUFFIX, scale_shape(spec.shape), torch.float32)
            return [(name, spec.shape, torch.float8_e4m3fn), scale]
        return [(name, spec.shape, torch.float32 if spec.dtypes == ("F32",) else self.dtype)]

    def draw(self, name: str, spec: TensorSpec) -> list[torch.Tensor]:
        center, spread = _distribution(name, spec.shape)
        numel = math.prod(spec.shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.randn(min(numel, DRAWN), generator=generator).mul_(spread).add_(center)
        quantised = self.fp8 and spec.quantised
        values = values.to(torch.float32 if quantised else self.stored(name, spec)[0][2])
        full = values.repeat(-(-numel // len(values)))[:numel].view(spec.shape)
        return list(quantize_fp8(full)) if quantised else [full]


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: they keep every activation near 1 and the logits at a few."""
    if name.endswith("e_score_correction_bias"):
        return 6.9, 0.1  # a large offset, as trained ones have: rounding it to bf16 would change the routing
    if name.endswith("bias"):
        return 0.0, 0.2
    if len(shape) == 1:  # norms
        return 1.0, 0.2
    if name == "model.embed_tokens.weight":
        return 0.0, 1.0
    gain = 2.0 if name == "lm_head.weight" else 1.0
    return 0.0, gain * shape[1] ** -0.5


def _quantization_config(specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """As GLM-5-FP8 has it, `indexers_proj` for `indexer.weights_proj` included."""
    kept = [name for name, spec in specs.items() if not spec.quantised]
    kept = [name.removesuffix(".weight").replace("indexer.weights_proj", "indexers_proj") for name in kept]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": sorted(kept),
    }


def _write_weights(folder: Path, specs: dict[str, TensorSpec], draw: Draw, shard_bytes: int) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors with an index when one file would exceed `shard_bytes`."""
    shards = list(_shards(specs, draw, shard_bytes))
    index, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        stored = [tensor for name in names for tensor in draw.stored(name, specs[name])]
        with open(folder / file, "wb") as out:
            out.write(_header(stored))
            for name in names:
                for tensor in draw.draw(name, specs[name]):
                    out.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        total += sum(map(_nbytes, stored))
        index |= {name: file for name, _, _ in stored}
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        _write_json(folder / "model.safetensors.index.json", content)


def _shards(specs: dict[str, TensorSpec], draw: Draw, shard_bytes: int) -> Iterator[list[str]]:
    """The names of each file, in the table's order; a tensor above `shard_bytes` has a file of its own."""
    names: list[str] = []
    used = 0
    for name, spec in specs.items():
        size = sum(map(_nbytes, draw.stored(name, spec)))
        if names and used + size > shard_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    yield names


def _nbytes(tensor: Stored) -> int:
    _, shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _header(stored: list[Stored]) -> bytes:
    """A safetensors header: its length as 8 bytes, then JSON padded with spaces so that the data are aligned to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in stored:
        end = start + _nbytes((name, shape, dtype))
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="random_checkpoint", description="Write a GLM-5 checkpoint of random weights."
    )
    parser.add_argument("out", help="new or empty folder")
    parser.add_argument("--config", help="a config.json to follow; default: a small one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="Linear weights in FP8 with 128x128 blocks, as GLM-5-FP8")
    args = parser.parse_args()
    try:
        config = read_json(Path(args.config), "--config cannot be read") if args.config else serve_config()
        folder = write_checkpoint(args.out, config, seed=args.seed, dtype=args.dtype, fp8=args.fp8)
    except (UserError, OSError) as error:
        sys.exit(f"random_checkpoint: {error}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
