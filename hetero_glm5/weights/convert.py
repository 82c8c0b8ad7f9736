"""Packs a checkpoint's routed experts into a store: layer by layer, several experts at a time, in bounded memory.

Each thread holds one expert: as read (72 MiB in BF16), packed, and unpacked again in fp32 (144 MiB) to measure what
packing cost; measured are 0.4 GB a thread at GLM-5's size. Files depend on the checkpoint and the layout alone. A
layer that is complete is kept when the work is taken up again; one that was being written is redone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from hetero_glm5.core import LoadProgress, UserError
from hetero_glm5.model_config import FP8_BLOCK, ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, dequantise
from hetero_glm5.weights.expert_source import RawExpert, checkpoint_layout, expert_names, pack, read_expert
from hetero_glm5.weights.expert_store import (
    PARTIAL,
    ExpertStore,
    LayerFile,
    LayerHead,
    LayerWriter,
    Report,
    file_name,
    layer_paths,
    read_layer,
    router_fingerprint,
    router_names,
)
from hetero_glm5.weights.names import expected_tensors, expert_tensors
from hetero_glm5.weights.quantize import PackedExperts

REPORT = "errors.json"
SAMPLE_BYTES = 4096  # of each matrix, in the fingerprint of what was packed
ROWS = 2 * FP8_BLOCK  # compared at a time
GIB = 1 << 30


class Conversion:
    """A checkpoint, a layout and a folder, found to fit together. Raises UserError before anything is written."""

    def __init__(self, folder: str | Path, out: str | Path, method: str, group: int = 0, book: str = ""):
        self.config = ModelConfig.load(folder)
        self.checkpoint, self.out = Checkpoint(folder), Path(out)
        try:
            self.layout = checkpoint_layout(self.checkpoint, self.config, method, group, book)
        except ValueError as error:
            raise UserError(f"--{error}; change it or leave it out.") from error
        self.layers = self._layers()
        self._check_names()
        self._refuse_strangers()
        self.finished = tuple(self._finished(path).head.layer for path in layer_paths(self.out))
        self.todo = tuple(layer for layer in self.layers if layer not in self.finished)
        self.source_bytes = sum(self.checkpoint.num_bytes(name) for layer in self.todo for name in self._names(layer))
        self._check_space()

    def close(self) -> None:
        self.checkpoint.close()

    def run(self, threads: int, report: Report = lambda progress: None) -> ExpertStore:
        """Packs what is not packed yet; returns the whole store, and writes REPORT beside its layers."""
        self.out.mkdir(parents=True, exist_ok=True)
        with _locked(self.out):
            for partial in self.out.glob(f"*{PARTIAL}"):
                partial.unlink()
            self._pack_layers(threads, report)
            store = ExpertStore(self.out)
            text = json.dumps(error_report(store), indent=2) + "\n"
            (self.out / f"{REPORT}{PARTIAL}").write_text(text, encoding="utf-8")
            (self.out / f"{REPORT}{PARTIAL}").rename(self.out / REPORT)
        return store

    def _pack_layers(self, threads: int, report: Report) -> None:
        started, experts = time.monotonic(), range(self.config.n_routed_experts)
        done, expert_bytes = 0, self.source_bytes // max(1, len(self.todo) * len(experts))
        scratch: SimpleQueue[PackedExperts] = SimpleQueue()
        for _ in range(threads):
            scratch.put(PackedExperts(self.layout, 1))

        def pack_one(writer: LayerWriter, expert: int) -> None:
            packed = scratch.get()
            try:
                raw = read_expert(self.checkpoint, writer.head.layer, expert)
                who = f"expert {expert} of layer {writer.head.layer}"
                pack(self.layout, packed.blob(0), raw, who, round_scales=True)
                writer.write(expert, packed.blob(0), relative_error(raw, packed))
            finally:
                scratch.put(packed)

        for layer in self.todo:
            with LayerWriter(self.out, self._head(layer)) as writer:
                with ThreadPoolExecutor(threads) as pool:  # ends before the file is closed, also after an error
                    for _ in pool.map(lambda expert, writer=writer: pack_one(writer, expert), experts):
                        done, seconds = done + expert_bytes, time.monotonic() - started
                        report(LoadProgress(f"layer {layer} of {self.layers[-1]}", done, self.source_bytes, seconds))
                writer.finish()

    def _layers(self) -> tuple[int, ...]:
        """The MoE layers; the MTP layer too if the checkpoint has its experts."""
        mtp = self.config.num_hidden_layers
        names = expert_tensors(self.config, mtp) if self.config.num_nextn_predict_layers else {"": None}
        here = all(map(self.checkpoint.stored, names))
        return (*self.config.moe_layers, *((mtp,) if here else ()))

    def _names(self, layer: int) -> list[str]:
        return list(expert_tensors(self.config, layer))

    def _check_names(self) -> None:
        known = expected_tensors(self.config, mtp=self.config.num_nextn_predict_layers > 0)
        needed = {name for layer in self.layers for name in (*self._names(layer), *router_names(layer))}
        self.checkpoint.check({name: known[name] for name in needed}, known)

    def _refuse_strangers(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise UserError(f"{self.out} is a file. Give a new folder for the packed experts.")
        ours = {path.name for path in layer_paths(self.out)} | {REPORT}
        strangers = sorted(p.name for p in self.out.iterdir() if p.name.removesuffix(PARTIAL) not in ours | self._files)
        if strangers:
            raise UserError(
                f"{self.out} holds {strangers[0]}, which belongs to no store of packed experts. Give a new folder."
            )

    @property
    def _files(self) -> set[str]:
        return {file_name(layer) for layer in self.layers}

    def _finished(self, path: Path) -> LayerFile:
        """A layer's file that is there already. UserError if it is not what this conversion would write."""
        file = read_layer(path)
        head, layout = file.head, file.head.layout
        if layout != self.layout:
            raise UserError(f"{file} is packed as {layout}, not as {self.layout}. Give a new folder, or delete it.")
        if head.layer not in self.layers or head != self._head(head.layer):
            raise UserError(
                f"{file} was packed from other weights than those of {self.checkpoint.folder}. Give a new folder, or "
                "delete it."
            )
        return file

    def _head(self, layer: int) -> LayerHead:
        return LayerHead(
            layer,
            self.layers,
            self.layout,
            self.config.n_routed_experts,
            router_fingerprint(self.checkpoint, layer),
            self._source_fingerprint(layer),
        )

    def _source_fingerprint(self, layer: int) -> str:
        """A hash of each matrix's type, shape and first bytes: enough to tell releases and fine-tunes apart."""
        digest = hashlib.blake2b(digest_size=16)
        for expert in range(self.config.n_routed_experts):
            for name in expert_names(layer, expert):
                for stored in self.checkpoint.stored(name):
                    entry = self.checkpoint.entries[stored]
                    digest.update(f"{stored} {entry.dtype} {entry.shape}".encode())
                    digest.update(self.checkpoint.read_start(stored, SAMPLE_BYTES))
        return digest.hexdigest()

    def _check_space(self) -> None:
        needed = len(self.todo) * (self.config.n_routed_experts * self.layout.blob_bytes + (1 << 16))
        place = next(path for path in (self.out.absolute(), *self.out.absolute().parents) if path.exists())
        partial = sum(path.stat().st_size for path in self.out.glob(f"*{PARTIAL}"))
        free = shutil.disk_usage(place).free + partial
        if needed > free:
            raise UserError(
                f"{len(self.todo)} layers of {self.config.n_routed_experts} experts as {self.layout.method} take "
                f"{needed / GIB:.2f} GiB, but {self.out} has {free / GIB:.2f} GiB of free space."
            )


def relative_error(raw: RawExpert, packed: PackedExperts) -> float:
    """|packed - original| / |original| over the three matrices, accumulated in fp64; 0 where packing lost nothing."""
    stored = packed.dequantize(0)
    if all(torch.equal(got, wanted) for got, wanted in _blocks(stored, raw)):
        return 0.0
    difference = size = 0.0
    for got, wanted in _blocks(stored, raw):
        size += _square(wanted)
        difference += _square(got.sub_(wanted))
    return math.sqrt(difference / size) if size else math.inf


def _blocks(stored: tuple[Tensor, ...], raw: RawExpert) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of three matrices [N, K], fp32, beside the same rows as they were before packing."""
    *originals, scales = raw
    for part, (got, original) in enumerate(zip(stored, originals, strict=True)):
        for row in range(0, original.shape[0], ROWS):
            rows = original[row : row + ROWS]
            if scales is None:
                wanted = rows.float()
            else:
                wanted = dequantise(rows, scales[part][row // FP8_BLOCK : (row + ROWS) // FP8_BLOCK])
            yield got[row : row + ROWS], wanted


def _square(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def error_report(store: ExpertStore) -> dict:
    """Mean and worst weight error by layer and over all, as JSON has it."""
    layers = []
    for layer, file in store.files.items():
        worst = max(range(store.experts), key=lambda expert: file.errors[expert])
        mean = sum(file.errors) / store.experts
        layers.append({"layer": layer, "mean": mean, "worst": file.errors[worst], "worst_expert": worst})
    return {
        "method": store.layout.method,
        "bits_per_weight": store.layout.bits_per_weight,
        "mean": sum(entry["mean"] for entry in layers) / len(layers),
        "worst": max(entry["worst"] for entry in layers),
        "layers": layers,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One conversion at a time; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another hetero-glm5 quantize is writing to {folder}.") from error
    else:
        yield
    finally:
        os.close(handle)
