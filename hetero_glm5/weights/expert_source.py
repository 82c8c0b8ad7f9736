"""Where a tier's packed experts come from: packed from a checkpoint as it is read, copied from a store, or mapped."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError
from hetero_glm5.weights.expert_store import ExpertStore
from hetero_glm5.weights.names import EXPERT_MATRICES, expert_prefix
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

RawExpert = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]  # gate, up, down, FP8 scales


class ExpertSource(Protocol):
    """Both calls may come from up to `loaders` threads at a time."""

    layout: ExpertLayout
    loaders: int
    mapped: bool  # whether the host's experts stay in files: those cannot be divided over NUMA nodes

    def fill(self, blob: Tensor, layer: int, expert: int) -> None:
        """Writes one packed expert into `blob`, uint8 [blob_bytes], contiguous on the CPU."""

    def place(self, packed: PackedExperts, layer: int, expert: int) -> None:
        """Gives the host tier one of its experts."""


class CheckpointExperts:
    """Packs each expert as it is read."""

    mapped = False
    loaders = 4  # each holds one unpacked expert: 72 MiB in BF16

    def __init__(self, checkpoint: Checkpoint, layout: ExpertLayout):
        self.checkpoint, self.layout = checkpoint, layout

    def fill(self, blob: Tensor, layer: int, expert: int) -> None:
        pack(self.layout, blob, read_expert(self.checkpoint, layer, expert), f"expert {expert} of layer {layer}")

    def place(self, packed: PackedExperts, layer: int, expert: int) -> None:
        with packed.filling(expert) as blob:
            self.fill(blob, layer, expert)


class StoredExperts:
    """Copies from a store, checksums compared."""

    mapped = False
    loaders = 8  # each holds one blob at most, on its way to the device or to NUMA nodes: 72 MiB in BF16

    def __init__(self, store: ExpertStore):
        self.store, self.layout = store, store.layout

    def fill(self, blob: Tensor, layer: int, expert: int) -> None:
        self.store.read(layer, expert, blob)

    def place(self, packed: PackedExperts, layer: int, expert: int) -> None:
        with packed.filling(expert) as blob:
            self.fill(blob, layer, expert)


class MappedExperts(StoredExperts):
    """Leaves the host's experts in the store's files; they are read as they are used, and unchecked."""

    mapped = True

    def place(self, packed: PackedExperts, layer: int, expert: int) -> None:
        self.store.map(layer, expert, packed)


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> RawExpert:
    """One routed expert as stored, on the CPU: gate and up [I, H], down [H, I], and their scales if FP8."""
    names = expert_names(layer, expert)
    scales = [scale for scale in map(checkpoint.read_scales, names) if scale is not None]
    gate, up, down = checkpoint.read_raw(*names)
    if not scales:
        return gate, up, down, None
    if len(scales) < len(names):
        raise CheckpointError(f"{expert_prefix(layer, expert)}* mixes FP8 and other types; all three must be alike.")
    return gate, up, down, (scales[0], scales[1], scales[2])


def expert_names(layer: int, expert: int) -> list[str]:
    return [f"{expert_prefix(layer, expert)}{matrix}.weight" for matrix in EXPERT_MATRICES]


def pack(layout: ExpertLayout, blob: Tensor, raw: RawExpert, who: str) -> None:
    """Packs a raw expert into `blob`. CheckpointError if the layout cannot hold it."""
    gate, up, down, scales = raw
    if layout.method == "FP8" and scales is None:
        raise CheckpointError(f"{who} is not FP8; --kt-method FP8 needs all to be. Use BF16.")
    layout.pack_into(blob, gate, up, down, scales)
