"""A checkpoint folder in Hugging Face format: which tensors it holds, and reading them in bounded memory.

Opening reads headers only (safetensors: 8 bytes of length, JSON, data). Data is read with pread in row blocks of about
BLOCK_BYTES straight into the destination: a memory map would keep every page it touched in the resident set until the
file is closed, and a whole-tensor read would hold large tensors twice while they change type.

FP8 tensors have a companion `<name>_scale_inv` (fp32, one multiplier for each 128x128 block, ragged at the edges);
value = float(q) · scale. A tensor is FP8 exactly if its companion exists, whatever config.json lists. An INT4 weight is
several tensors under names of their own (names.int4_tensors); how they are to be read, config.json says.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hetero_glm5.core import UserError
from hetero_glm5.model_config import COMPRESSED_TENSORS, FP8_BLOCK, int4_scheme, read_json
from hetero_glm5.weights.int4_matrix import Int4Matrix
from hetero_glm5.weights.names import SCALE_SUFFIX, TensorSpec, int4_tensors, scale_shape

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64
MAX_HEADER_BYTES = 100 << 20  # the safetensors specification's limit
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
DTYPES = FLOATS | {"I32": torch.int32, "I64": torch.int64}


class CheckpointError(UserError):
    """Files that are missing, damaged, or not this model's."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Files:
    """Files opened when they are first read, and kept open. `bytes_read` counts what was read so far. Thread-safe."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def read(self, path: Path, offset: int, out: Tensor) -> None:
        """Fills `out`, contiguous, with the bytes from `offset` on."""
        view = memoryview(out.view(-1).view(torch.uint8).numpy()) if out.numel() else memoryview(b"")
        file, done = self.open(path), 0
        while done < len(view):
            got = os.preadv(file, [view[done : done + BLOCK_BYTES]], offset + done)
            if not got:
                raise CheckpointError(f"{path} ended while it was being read; was it replaced?")
            done += got
        with self._lock:
            self.bytes_read += len(view)

    def open(self, path: Path) -> int:
        """Its file number, good until close()."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


class Checkpoint:
    """`bytes_read` counts what has been read so far, from any thread."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for path, names in _shards(self.folder).items():
            header = _checked_header(path)
            missing = [name for name in names if name not in header]
            if missing:
                raise CheckpointError(f"{path} lacks {_some(missing)}, which the index places there.")
            twice = [name for name in header if name in self.entries]
            if twice:
                raise CheckpointError(f"{path} holds {_some(twice)}, and so does {self.entries[twice[0]].path}.")
            self.entries |= header
        self.int4 = int4_scheme(self.folder)
        self._shapes: dict[str, tuple[int, ...]] = {}  # of weights, from the name table
        self._files = Files()

    def close(self) -> None:
        self._files.close()

    @property
    def bytes_read(self) -> int:
        return self._files.bytes_read

    def check(self, needed: dict[str, TensorSpec], known: dict[str, TensorSpec]) -> None:
        """Compares headers with the name table: every `needed` tensor must be there, every tensor must be `known`, and
        shapes, types and scales must fit. Raises one CheckpointError that lists all that is wrong."""
        self._shapes = {name: spec.shape for name, spec in known.items()}
        parts: dict[str, TensorSpec] = {}  # of quantised weights
        for name, spec in known.items():
            if spec.quantised:
                parts[name + SCALE_SUFFIX] = TensorSpec(scale_shape(spec.shape), dtypes=("F32",))
            parts |= self._int4_parts(name, spec)
        misfits = []
        for name, entry in self.entries.items():
            if name in parts:
                misfits += _misfits(name, entry, parts[name])
            elif name in known:
                misfits += _misfits(name, entry, known[name])
                misfits += self._scale_misfits(name, entry, known[name])
                misfits += [f"{name} is there and so is {part}" for part in self._int4_names(name)]
        problems = {
            "missing": [part for name, spec in needed.items() for part in self._missing(name, spec)],
            "unexpected": [name for name in self.entries if name not in known and name not in parts],
            "not as expected": misfits,
        }
        found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        if found:
            raise CheckpointError(f"{self.folder} does not fit its config.json. " + "; ".join(found) + ".")

    def _scale_misfits(self, name: str, entry: Entry, spec: TensorSpec) -> list[str]:
        has_scale = name + SCALE_SUFFIX in self.entries
        if entry.dtype == "F8_E4M3" and not has_scale:
            return [f"{name} is FP8 but has no {SCALE_SUFFIX.lstrip('_')}"]
        if has_scale and spec.quantised and entry.dtype != "F8_E4M3":
            return [f"{name} has a {SCALE_SUFFIX.lstrip('_')} but is {entry.dtype}, not F8_E4M3"]
        return []

    def _int4_parts(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What a Linear weight would be stored as in INT4, if the checkpoint has any such."""
        return int4_tensors(name, spec.shape, self.int4) if self.int4 and len(spec.shape) == 2 else {}

    def _missing(self, name: str, spec: TensorSpec) -> list[str]:
        """What `name` lacks to be complete: nothing, itself, or parts of an INT4 weight."""
        if not self.stored(name):
            return [name]
        if self.method(name) != "INT4":
            return []
        order_matters = self.int4 is not None and self.int4.act_order
        absent = [part for part in self._int4_parts(name, spec) if part not in self.entries]
        return [part for part in absent if order_matters or not part.endswith("g_idx")]

    def _int4_names(self, name: str) -> list[str]:
        """The tensors that are there of an INT4 weight, in the order of names.int4_tensors."""
        return [part for part in int4_tensors(name, (1, 1), self.int4) if part in self.entries] if self.int4 else []

    def stored(self, name: str) -> list[str]:
        """The tensors that weight `name` is made of: itself, in FP8 its scales too, or the parts of INT4. Empty if it
        is not there."""
        if name not in self.entries:
            return self._int4_names(name)
        return [name, name + SCALE_SUFFIX] if self.is_fp8(name) else [name]

    def method(self, name: str) -> str:
        """FP8 or INT4 if that weight is quantised so, else empty."""
        if self.is_fp8(name):
            return "FP8"
        return "INT4" if name not in self.entries and self._int4_names(name) else ""

    def common_method(self, names: Iterable[str]) -> str:
        """FP8 or INT4 if all these weights are quantised so, else empty."""
        methods = set(map(self.method, names))
        return methods.pop() if len(methods) == 1 else ""

    def is_fp8(self, name: str) -> bool:
        return name + SCALE_SUFFIX in self.entries

    def num_bytes(self, name: str) -> int:
        """Bytes on disk, the scales included."""
        return sum(self.entries[part].num_bytes for part in self.stored(name))

    def read_raw(self, *names: str) -> tuple[Tensor, ...]:
        """Tensors as stored, on the CPU, all in one allocation: malloc keeps freed blocks below its mmap threshold (up
        to 32 MiB) for the process; each matrix of an expert lies below it, the three together above."""
        entries = [self.entries[name] for name in names]
        sizes = [-(-entry.num_bytes // ALIGNMENT) * ALIGNMENT for entry in entries]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        tensors = []
        for entry, part in zip(entries, block.split(sizes), strict=True):
            tensor = part[: entry.num_bytes].view(DTYPES[entry.dtype]).view(entry.shape)
            self._files.read(entry.path, entry.offset, tensor)
            tensors.append(tensor)
        return tuple(tensors)

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a tensor, fewer if it is smaller."""
        entry = self.entries[name]
        out = torch.empty(min(num_bytes, entry.num_bytes), dtype=torch.uint8)
        self._files.read(entry.path, entry.offset, out)
        return out.numpy().tobytes()

    def read_scales(self, name: str) -> Tensor | None:
        """The fp32 multipliers of an FP8 tensor [ceil(rows/128), ceil(cols/128)], or None."""
        return self.read_raw(name + SCALE_SUFFIX)[0] if self.is_fp8(name) else None

    def read_int4(self, name: str) -> Int4Matrix:
        """An INT4 weight that check() knows, its codes and scales bit for bit. CheckpointError if its zeros or its
        order of columns cannot be kept."""
        assert self.int4
        group = self.int4.group
        _, cols = self._shapes[name]
        if self.int4.kind == COMPRESSED_TENSORS:
            words, scales, shape = self.read_raw(*self.stored(name))
            if tuple(shape.tolist()) != self._shapes[name]:
                raise CheckpointError(
                    f"{name}_shape is {shape.tolist()}, expected {list(self._shapes[name])}. Fetch the shard again."
                )
            return Int4Matrix(words.view(torch.uint8), scales, cols, group)
        words, zeros, scales, *order = self.read_raw(*self.stored(name))
        zero = self.int4.stored_zero
        nibbles = zeros.view(torch.uint8)
        wrong = nibbles[nibbles != zero * 17]
        if len(wrong):
            found = next(nibble for nibble in (wrong[0].item() & 15, wrong[0].item() >> 4) if nibble != zero)
            raise CheckpointError(
                f"{self.stored(name)[1]} holds {found} where only {zero} can be read: the zero must lie in the middle, "
                "as symmetric quantisation has it. Quantise the model again with sym, or use its BF16 checkpoint."
            )
        if order and not torch.equal(order[0], torch.arange(cols, dtype=torch.int32) // group):
            raise CheckpointError(
                f"{self.stored(name)[3]} puts columns in an order of their own (act-order); only groups of "
                "neighbouring columns can be read. Quantise the model again without desc_act, or use its BF16 "
                "checkpoint."
            )
        return Int4Matrix(words.T.contiguous().view(torch.uint8), scales.T.contiguous(), cols, group)

    def read(self, name: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """The tensor converted (FP8, INT4: dequantised) to `dtype` on `device`; never more than one block in between,
        and the codes of an INT4 weight."""
        if self.method(name) == "INT4":
            matrix = self.read_int4(name)
            out = torch.empty(matrix.shape, dtype=dtype, device=device)
            for a in range(0, len(out), FP8_BLOCK):
                out[a : a + FP8_BLOCK] = matrix[a : a + FP8_BLOCK].to(dtype)
            return out
        entry, scales = self.entries[name], self.read_scales(name)
        if DTYPES[entry.dtype] == dtype and device == "cpu":
            return self.read_raw(name)[0]
        out = torch.empty(entry.shape, dtype=dtype, device=device)
        if not entry.shape:
            return out.copy_(self.read_raw(name)[0])
        row_bytes = entry.num_bytes // max(1, entry.shape[0])
        block = max(1, BLOCK_BYTES // max(1, row_bytes) // FP8_BLOCK) * FP8_BLOCK
        for a in range(0, entry.shape[0], block):
            rows = torch.empty(min(block, entry.shape[0] - a), *entry.shape[1:], dtype=DTYPES[entry.dtype])
            self._files.read(entry.path, entry.offset + a * row_bytes, rows)
            if scales is not None:
                rows = dequantise(rows, scales[a // FP8_BLOCK : -(-(a + block) // FP8_BLOCK)])
            out[a : a + block] = rows.to(dtype)
        return out


def dequantise(rows: Tensor, scales: Tensor) -> Tensor:
    """FP8 rows [R, C], the first at a block boundary, times scales [ceil(R/128), ceil(C/128)] → fp32."""
    spread = scales.repeat_interleave(FP8_BLOCK, 0)[: rows.shape[0]]
    wide = rows.float()
    for block in range(scales.shape[1]):
        columns = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        wide[:, columns] *= spread[:, block, None]
    return wide


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files, each with the names that the index (if there is one) places in it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if _is_file(single):
            return {single: []}
        raise CheckpointError(f"{folder} has neither model.safetensors.index.json nor model.safetensors.")
    weight_map = read_json(index, f"cannot read {index}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" object of names and file names.')
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not file:
            raise CheckpointError(f"{index} places {name} in {file!r}; shards must be files of the same folder.")
        shards.setdefault(folder / file, []).append(name)
    absent = [path.name for path in shards if not _is_file(path)]
    if absent:
        raise CheckpointError(f"{folder} lacks {len(absent)} of its {len(shards)} shards: {_some(absent)}.")
    return shards


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """A safetensors file's tensors and metadata. Where its data end is not checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is no safetensors file, or is truncated ({size} bytes).")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            metadata = dict(header.pop("__metadata__", {}))
            return {name: _entry(path, value, 8 + length) for name, value in header.items()}, metadata
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header ({error}).") from error


def _checked_header(path: Path) -> dict[str, Entry]:
    entries, _ = read_header(path)
    size = path.stat().st_size
    for name, entry in entries.items():
        values = math.prod(entry.shape)
        if entry.dtype in DTYPES and entry.num_bytes != values * DTYPES[entry.dtype].itemsize:
            raise CheckpointError(f"{path}: {name} is {entry.dtype} {entry.shape} but has {entry.num_bytes} bytes.")
        if entry.offset + entry.num_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {entry.offset + entry.num_bytes}, the file at {size}. "
                "Fetch the shard again."
            )
    in_order = sorted(entries.items(), key=lambda item: item[1].offset)
    for (name, entry), (next_name, next_entry) in pairwise(in_order):
        if entry.offset + entry.num_bytes > next_entry.offset and next_entry.num_bytes:
            raise CheckpointError(f"{path} has a damaged safetensors header ({name} and {next_name} overlap).")
    return entries


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _entry(path: Path, value: dict, data: int) -> Entry:
    (first, last), shape, dtype = value["data_offsets"], value["shape"], value["dtype"]
    if not all(type(n) is int and n >= 0 for n in (first, last, *shape)) or type(dtype) is not str or first > last:
        raise ValueError(f"{dtype!r}, shape {shape}, bytes {first} to {last}")
    return Entry(path, dtype, tuple(shape), data + first, last - first)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _misfits(name: str, entry: Entry, spec: TensorSpec) -> list[str]:
    if entry.shape != spec.shape:
        return [f"{name} has shape {list(entry.shape)}, expected {list(spec.shape)}"]
    allowed = spec.dtypes or (tuple(FLOATS) if spec.quantised else ("F32", "F16", "BF16"))
    if entry.dtype not in allowed:
        return [f"{name} is {entry.dtype}, expected {' or '.join(allowed)}"]
    return []


def _some(names: list[str], most: int = 12) -> str:
    """The names, cut after `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
