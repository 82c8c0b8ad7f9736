"""The packed expert store: routed experts on disk as the bytes that both tiers compute from.

A folder of ordinary safetensors files, one for each MoE layer: `layer-00003.safetensors` holds one uint8 tensor
`experts` [experts, blob_bytes] and, as metadata, how the blobs are packed, which model they belong to, and each
expert's CRC-32 and weight error. The header is padded so that every expert starts at a multiple of 4096 bytes: an
expert is read by one pread or mapped as it is. A file is written under another name and renamed when it is whole, so
a file with its right name is complete. CRC-32 (zlib) is checked when an expert is read into memory, and by `verify`;
mapping checks nothing. It is the fastest checksum in the standard library (8.5 GB/s a thread on an AMD Zen 5;
Adler-32 5.0, SHA-1 2.6, BLAKE2b 1.7), and any tool can recompute it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.core import LoadProgress
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError, Files, read_header
from hetero_glm5.weights.names import layer_prefix
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

KIND = "hetero_glm5 packed experts"
TENSOR = "experts"
PAGE = _C.BLOB_ALIGN
PARTIAL = ".partial"  # ending of a file that is being written
CHUNK_BYTES = 4 << 20  # read at a time to verify
REDO = "Delete the file and run hetero-glm5 quantize again; it keeps the other layers."

Report = Callable[[LoadProgress], None]


class StoreError(CheckpointError):
    """A packed store that is incomplete, damaged, or not this model's."""


@dataclass(frozen=True)
class LayerHead:
    """What one layer's file holds."""

    layer: int
    layers: tuple[int, ...]  # all that the store is made of
    layout: ExpertLayout
    experts: int
    model: str  # router_fingerprint of the layer: which model the experts belong to
    source: str  # which weights of it they were packed from

    def metadata(self, checksums: Sequence[int], errors: Sequence[float]) -> dict[str, str]:
        layout = {f.name: getattr(self.layout, f.name) for f in dataclasses.fields(self.layout) if f.init}
        return {
            "kind": KIND,
            "layout_version": str(self.layout.version),
            "layout": json.dumps(layout),
            "layer": str(self.layer),
            "layers": " ".join(map(str, self.layers)),
            "model": self.model,
            "source": self.source,
            "crc32": " ".join(f"{checksum:08x}" for checksum in checksums),
            "errors": " ".join(f"{error:9.3e}" for error in errors),
        }


@dataclass(frozen=True)
class LayerFile:
    """A layer's file, found to be whole as far as its header and its size tell."""

    path: Path
    head: LayerHead
    start: int  # of expert 0
    checksums: tuple[int, ...]
    errors: tuple[float, ...]  # |packed - original| / |original| of each expert

    def __str__(self) -> str:
        return f"{self.path} (layer {self.head.layer})"

    def offset(self, expert: int) -> int:
        return self.start + expert * self.head.layout.blob_bytes

    def check(self, expert: int, checksum: int) -> None:
        if checksum != self.checksums[expert]:
            raise StoreError(
                f"{self.path} is damaged: expert {expert} of layer {self.head.layer} has CRC-32 {checksum:08x}, and "
                f"{self.checksums[expert]:08x} was written. {REDO}"
            )


class ExpertStore:
    """Opens a store: reads headers only. Raises StoreError. All reading may be done from several threads."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files = [read_layer(path) for path in layer_paths(self.folder)]
        if not files:
            raise StoreError(f"{self.folder} holds no packed experts ({file_name(3)} and the like).")
        self.files = {file.head.layer: file for file in files}
        first = files[0].head
        self.layout, self.experts = first.layout, first.experts
        for file in files[1:]:
            if (file.head.layout, file.head.experts, file.head.layers) != (first.layout, first.experts, first.layers):
                raise StoreError(
                    f"{file} and {files[0].path.name} are of different stores. Keep them in folders apart."
                )
        self._require(first.layers, "the store was made with it")
        self._opened = Files()

    @property
    def bytes_read(self) -> int:
        return self._opened.bytes_read

    def num_bytes(self, layers: Sequence[int]) -> int:
        return len(layers) * self.experts * self.layout.blob_bytes

    def close(self) -> None:
        """What was mapped stays mapped."""
        self._opened.close()

    def check(self, config: ModelConfig, layers: Sequence[int], router: Checkpoint) -> None:
        """Whether it is of this model: has its `layers`, its dimensions, and experts that `router`'s weights chose."""
        self._require(layers, "the model needs it")
        file = self.files[layers[0]]
        mine = (self.experts, self.layout.hidden, self.layout.intermediate)
        models = (config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        if mine != models:
            raise StoreError(
                f"{file} holds {mine[0]} experts of hidden size {mine[1]} and width {mine[2]}; the model has "
                f"{models[0]} of {models[1]} and {models[2]}. Pack this model's checkpoint: hetero-glm5 quantize."
            )
        for layer in layers:
            if self.files[layer].head.model != router_fingerprint(router, layer):
                raise StoreError(
                    f"{self.files[layer]} was packed from another model than {router.folder}: the router weights "
                    "differ. Pack this model's checkpoint: hetero-glm5 quantize."
                )

    def _require(self, layers: Sequence[int], why: str) -> None:
        missing = [layer for layer in layers if layer not in self.files]
        if missing:
            more = f", and {len(missing) - 1} more layers are" if len(missing) > 1 else " is"
            raise StoreError(
                f"{self.folder / file_name(missing[0])} (layer {missing[0]}){more} missing; {why}. "
                "Run hetero-glm5 quantize again: it adds what is missing."
            )

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Copies one expert into `blob`, uint8 [blob_bytes], contiguous on the CPU. StoreError if it is damaged."""
        file = self.files[layer]
        self._opened.read(file.path, file.offset(expert), blob)
        file.check(expert, zlib.crc32(blob.numpy().data))

    def map(self, layer: int, expert: int, packed: PackedExperts) -> None:
        """Makes the file's own pages the memory of a resident expert: nothing is read until it is used."""
        file = self.files[layer]
        packed.weights.map(expert, self._opened.open(file.path), file.offset(expert))

    def verify(self, threads: int, report: Report = lambda progress: None) -> list[str]:
        """Reads every expert; a sentence for each that is not what was written."""
        started = time.monotonic()
        total = self.num_bytes(list(self.files))
        problems: list[str] = []
        with ThreadPoolExecutor(threads) as pool:
            for file in self.files.values():
                for problem in pool.map(lambda expert, file=file: self._verify(file, expert), range(self.experts)):
                    problems += problem
                    seconds = time.monotonic() - started
                    report(LoadProgress(f"layer {file.head.layer}", self.bytes_read, total, seconds))
        return problems

    def _verify(self, file: LayerFile, expert: int) -> list[str]:
        size, checksum = self.layout.blob_bytes, 0
        chunk = torch.empty(min(CHUNK_BYTES, size), dtype=torch.uint8)
        for start in range(0, size, CHUNK_BYTES):
            part = chunk[: size - start]
            self._opened.read(file.path, file.offset(expert) + start, part)
            checksum = zlib.crc32(part.numpy().data, checksum)
        try:
            file.check(expert, checksum)
        except StoreError as error:
            return [str(error)]
        return []


class LayerWriter:
    """Writes one layer's file; its experts may come in any order and from several threads. A context manager: the file
    appears under its name by `finish`; left without it, nothing stays."""

    def __init__(self, folder: Path, head: LayerHead):
        self.path, self.head = folder / file_name(head.layer), head
        self._checksums, self._errors = [0] * head.experts, [0.0] * head.experts
        self._start = len(_header(head, self._checksums, self._errors))
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
        self._partial.unlink(missing_ok=True)

    def write(self, expert: int, blob: Tensor, error: float) -> None:
        view = blob.numpy().data
        self._checksums[expert], self._errors[expert] = zlib.crc32(view), error
        self._put(view, self._start + expert * len(view))
        # starts writing to disk without waiting for it, so that `finish` has little left to flush
        os.posix_fadvise(self._file, self._start + expert * len(view), len(view), os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Every expert has been written: flushes the file to disk and gives it its name."""
        self._put(memoryview(_header(self.head, self._checksums, self._errors)), 0)
        os.fsync(self._file)
        self._partial.rename(self.path)

    def _put(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset + done)


def is_store(folder: str | Path) -> bool:
    return any(layer_paths(Path(folder)))


def layer_paths(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("layer-*.safetensors")) if re.fullmatch(r"layer-\d{5}", path.stem))


def file_name(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


def read_layer(path: Path) -> LayerFile:
    """Reads the header; refuses a file of another layout version, a truncated one, and what is no layer of a store."""
    where = f"{path} (layer {int(path.stem.removeprefix('layer-'))})"
    entries, metadata = read_header(path)
    if metadata.get("kind") != KIND:
        raise StoreError(f"{where} is no file of packed experts.")
    if metadata.get("layout_version") != str(_C.LAYOUT_VERSION):
        raise StoreError(
            f"{where} has layout version {metadata.get('layout_version')}; this version of hetero_glm5 reads "
            f"{_C.LAYOUT_VERSION}. Pack the checkpoint again: hetero-glm5 quantize."
        )
    try:
        layout = ExpertLayout(**json.loads(metadata["layout"]))
        entry = entries[TENSOR]
        experts, size = entry.shape
        numbers = tuple(map(int, metadata["layers"].split()))
        head = LayerHead(int(metadata["layer"]), numbers, layout, experts, metadata["model"], metadata["source"])
        checksums = tuple(int(word, 16) for word in metadata["crc32"].split())
        file = LayerFile(path, head, entry.offset, checksums, tuple(map(float, metadata["errors"].split())))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where} has a header that this version of hetero_glm5 cannot read ({error}).") from error
    consistent = (
        path.name == file_name(head.layer)
        and size == layout.blob_bytes
        and entry.dtype == "U8"
        and entry.offset % PAGE == 0
        and len(file.checksums) == len(file.errors) == experts
    )
    if not consistent:
        raise StoreError(f"{where} has a header that contradicts itself. {REDO}")
    found, whole = path.stat().st_size, file.offset(experts)
    if found != whole:
        cut = f": expert {max(0, found - file.start) // size} is cut" if found < whole else ""
        raise StoreError(f"{where} is {found} bytes long and should be {whole}{cut}. {REDO}")
    return file


def router_fingerprint(checkpoint: Checkpoint, layer: int) -> str:
    """A hash of the weights that choose among a layer's experts: the same in the BF16 and FP8 releases of a model, but
    not in two different models."""
    digest = hashlib.blake2b(digest_size=16)
    for name in router_names(layer):
        weight = checkpoint.read(name, torch.float32)
        digest.update(weight.numpy().data)
    return digest.hexdigest()


def router_names(layer: int) -> tuple[str, str]:
    return f"{layer_prefix(layer)}mlp.gate.weight", f"{layer_prefix(layer)}mlp.gate.e_score_correction_bias"


def _header(head: LayerHead, checksums: Sequence[int], errors: Sequence[float]) -> bytes:
    """The file up to expert 0: the JSON's length, the JSON, spaces up to a whole page. Its length depends on `head`."""
    size = head.experts * head.layout.blob_bytes
    tensor = {"dtype": "U8", "shape": [head.experts, head.layout.blob_bytes], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": head.metadata(checksums, errors), TENSOR: tensor}).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text
