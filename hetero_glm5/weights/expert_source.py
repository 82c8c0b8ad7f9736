"""Where a tier's packed experts come from: packed from a checkpoint as it is read, copied from a store, or mapped."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError
from hetero_glm5.weights.expert_store import ExpertStore
from hetero_glm5.weights.int4_matrix import Int4Matrix
from hetero_glm5.weights.names import EXPERT_MATRICES, expert_prefix, expert_tensors
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

Matrix = Tensor | Int4Matrix
RawExpert = tuple[Matrix, Matrix, Matrix, tuple[Tensor, Tensor, Tensor] | None]  # gate, up, down, FP8 scales


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
    """One routed expert as stored, on the CPU: gate and up [I, H], down [H, I], and their scales if FP8. All three are
    Int4Matrix, or none is."""
    names = expert_names(layer, expert)
    method, *others = (checkpoint.method(name) for name in names)
    if any(other != method for other in others):
        kinds = " and ".join(sorted({method, *others} - {""}))
        raise CheckpointError(
            f"{expert_prefix(layer, expert)}* mixes {kinds} and other types; all three must be alike."
        )
    if method == "INT4":
        gate, up, down = map(checkpoint.read_int4, names)
        return gate, up, down, None
    scales = [scale for scale in map(checkpoint.read_scales, names) if scale is not None]
    weights = checkpoint.read_raw(*names)
    return weights[0], weights[1], weights[2], (scales[0], scales[1], scales[2]) if scales else None


def expert_names(layer: int, expert: int) -> list[str]:
    return [f"{expert_prefix(layer, expert)}{matrix}.weight" for matrix in EXPERT_MATRICES]


def checkpoint_layout(
    checkpoint: Checkpoint, config: ModelConfig, method: str, group: int = 0, book: str = ""
) -> ExpertLayout:
    """The layout of a checkpoint's experts packed as `method`. In INT4, what it leaves open is the checkpoint's own if
    that has INT4 experts, so that their codes and scales are kept. ValueError on a group or book that cannot be."""
    if method == "INT4" and checkpoint.int4 and group in (0, checkpoint.int4.group) and _any_int4(checkpoint, config):
        group, book = checkpoint.int4.group, book or "linear"
    return ExpertLayout(method, config.hidden_size, config.moe_intermediate_size, group, book)


def _any_int4(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return any(checkpoint.method(name) == "INT4" for layer in layers for name in expert_tensors(config, layer))


def pack(layout: ExpertLayout, blob: Tensor, raw: RawExpert, who: str, round_scales: bool = False) -> None:
    """Packs a raw expert into `blob`. INT4 codes and scales are kept bit for bit where the layout is theirs; a scale
    that fp16 cannot hold exactly is rounded if `round_scales`. CheckpointError if the layout cannot hold the expert."""
    gate, up, down, scales = raw
    if layout.method == "FP8" and scales is None:
        raise CheckpointError(f"{who} is not FP8; --kt-method FP8 needs all to be. Use BF16.")
    matrices = [matrix for matrix in (gate, up, down) if isinstance(matrix, Int4Matrix)]
    if matrices and (layout.book, layout.group) == ("linear", matrices[0].group):
        halves = []
        for name, matrix in zip(EXPERT_MATRICES, matrices, strict=True):
            try:
                halves.append(matrix.half_scales(round_scales))
            except ValueError as error:
                remedy = "" if round_scales else ", or hetero-glm5 quantize, which rounds and reports the error"
                raise CheckpointError(f"{name} of {who} has {error}. Use --kt-method BF16{remedy}.") from error
        layout.pack_codes_into(blob, [matrix.codes for matrix in matrices], halves)
    else:
        gate, up, down = (matrix[:] for matrix in (gate, up, down))
        try:
            layout.pack_into(blob, gate, up, down, scales)
        except ValueError as error:  # NaN or infinity in an integer format
            raise CheckpointError(f"{who}: {error}. Use --kt-method BF16, or fetch the shard again.") from error
