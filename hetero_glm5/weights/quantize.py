"""Weight formats of routed experts: packing into blobs, and reading them back.

An expert is one contiguous blob of tiles (32 output rows, 4 bytes of K innermost), the same bytes for every ISA, for
both devices and on disk. The layout is defined once, in csrc/format; this module drives it and holds the packed experts
of a layer. `ExpertLayout.unpack` reads the same bytes by torch operations, on devices the C++ code cannot reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import _C

METHODS: tuple[str, ...] = tuple(_C.formats())  # canonical --kt-method names
FP8_MAX = 448.0  # largest E4M3 value

_GATE, _UP, _DOWN = range(3)
_CODES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn}

Scales = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ExpertLayout:
    """Where the weights of one expert are inside its blob.

    method: one of METHODS. hidden (H), intermediate (I): any size from 1; gate and up are [I, H], down is [H, I].
    group: columns of a row that share a scale, 32, 64 or 128, in INT8 and INT4; 128 by default, 32 in
    the linear book. book: the
    16-entry code books of INT4, "gaussian" (the default) or "linear" (-8..7, what imported checkpoints have).
    """

    method: str
    hidden: int
    intermediate: int
    group: int = 0
    book: str = ""
    _c: _C.ExpertLayout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        c = _C.ExpertLayout(self.method, self.hidden, self.intermediate, self.group, self.book)
        for name, value in (("_c", c), ("group", c.group), ("book", c.book)):  # with the format's defaults
            object.__setattr__(self, name, value)

    @property
    def blob_bytes(self) -> int:
        """Bytes of one expert, padding included; a multiple of 4096."""
        return self._c.blob_bytes

    @property
    def version(self) -> int:
        return _C.LAYOUT_VERSION

    @property
    def bits_per_weight(self) -> float:
        """Scales and padding included."""
        return 8 * self.blob_bytes / (3 * self.hidden * self.intermediate)

    def pack_into(self, blob: Tensor, gate: Tensor, up: Tensor, down: Tensor, scales: Scales | None = None) -> None:
        """Packs one expert into blob, uint8 [blob_bytes]; sources are contiguous CPU tensors, converted on the way.

        gate, up [I, H], down [H, I]: float32, bfloat16, float16 (not for FP8), or float8_e4m3fn with scales = fp32
        (gate, up, down) block scales [ceil(rows/128), ceil(cols/128)]. FP8 keeps codes and scales bit for bit; the
        other methods store value * scale, INT8 and INT4 as weights/integers.py says. Releases the GIL.
        ValueError on a wrong shape, dtype or memory layout, and on a weight that an integer format cannot express.
        """
        parts = {"gate": gate, "up": up, "down": down}
        sources = [_host_bytes(name, source) for name, source in parts.items()]
        dtypes = [str(source.dtype).removeprefix("torch.") for source in parts.values()]
        blocks: list[np.ndarray | None] = [None] * 3
        if scales is not None:
            blocks = [host_array(f"{name} scales", scale) for name, scale in zip(parts, scales, strict=True)]
        _C.pack(self._c, host_array("blob", blob), sources, dtypes, blocks)

    def pack_codes_into(self, blob: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        """Packs the given gate, up and down [N, K] of INT4 under the linear books, bit for bit: W = (code - 8) * scale.

        codes: uint8 [N, ceil(K/8) * 4] each, two a byte, the first in the low bits; scales: float16
        [N, ceil(K/group)] each, finite. Releases the GIL. ValueError on another layout, shape or dtype.
        """
        arrays = [host_array("codes", code) for code in codes]
        bits = [host_array("scales", half.view(torch.int16)) for half in scales]
        _C.pack_codes(self._c, host_array("blob", blob), arrays, bits)

    def unpack(self, blob: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """blob uint8 [blob_bytes], any device -> gate [I, H], up [I, H], down [H, I] of that dtype, there.

        Torch operations only: the FP8 product value * scale is taken in float32 and then rounded to dtype.
        """
        gate_up, down = self._c.gate, self._c.down
        pairs = blob[: self._c.down_offset].view(gate_up.tiles, 2, gate_up.tile_bytes)
        tiles = blob[self._c.down_offset : self._c.scales_offset].view(down.tiles, down.tile_bytes)
        if not self.group:
            parts = ((gate_up, pairs[:, _GATE]), (gate_up, pairs[:, _UP]), (down, tiles))
            return tuple(self._unpack_floats(m, part, dtype) for m, part in parts)
        inputs, hidden = self.column_scales(blob)
        return (
            self._unpack_integers(gate_up, pairs[:, _GATE]).mul_(inputs).to(dtype),
            self._unpack_integers(gate_up, pairs[:, _UP]).mul_(inputs).div_(hidden[:, None]).to(dtype),
            self._unpack_integers(down, tiles).mul_(hidden).to(dtype),
        )

    def column_scales(self, blob: Tensor) -> tuple[Tensor, Tensor]:
        """Of an integer format's blob: float32 powers of two [H] and [I], by which the stored columns of gate and up,
        and of down, are to be multiplied; up's stored rows are to be divided by the latter."""
        scales = blob[self._c.scales_offset :][: self._c.scales_bytes].view(torch.bfloat16).float()
        return scales[: self.hidden], scales[self.hidden :]

    def _unpack_floats(self, m: _C.MatrixLayout, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        order = self._c.code_order
        lines = tiles[:, : m.scale_offset].reshape(m.tiles, m.lines, _C.TILE_ROWS, 4).view(_CODES[self.method])
        codes = torch.stack([lines[..., place] for place in order], dim=-1)  # [tiles, lines, 32, line_k]
        rows = codes.transpose(1, 2).reshape(m.tiles * _C.TILE_ROWS, -1)[: m.rows, : m.cols]
        if m.scale_cols == 0:
            return rows.to(dtype)
        scales = tiles[:, m.scale_offset :].contiguous().view(torch.float32)[:, : m.scale_cols]  # [tiles, blocks of K]
        scales = scales.repeat_interleave(_C.TILE_ROWS, 0).repeat_interleave(_C.FP8_BLOCK, 1)
        return (rows.float() * scales[: m.rows, : m.cols]).to(dtype)

    def _unpack_integers(self, m: _C.MatrixLayout, tiles: Tensor) -> Tensor:
        codes = tiles[:, : m.scale_offset].reshape(m.tiles, m.lines, _C.TILE_ROWS, 4).transpose(1, 2)
        scales = tiles[:, m.scale_offset : m.choice_offset].contiguous().view(torch.float16)
        scales = scales[:, : m.scale_cols * _C.TILE_ROWS]
        scales = scales.reshape(m.tiles, m.scale_cols, _C.TILE_ROWS).transpose(1, 2)  # [tiles, 32, groups]
        if self.method == "INT4":
            codes = torch.stack((codes & 15, codes >> 4), 3).long()  # [tiles, 32, lines, 2, 4]
            if self.book == "gaussian":
                codes += _C.BOOK_ENTRIES * self._choices(m, tiles)[..., None, None]
            values = torch.tensor(self._c.books, dtype=torch.float32, device=tiles.device)[codes]
        else:
            values = codes.float() - 128
        weights = values.reshape(m.tiles, _C.TILE_ROWS, m.scale_cols, self.group) * scales.float()[..., None]
        return weights.reshape(m.tiles * _C.TILE_ROWS, -1)[: m.rows, : m.cols]

    @staticmethod
    def _choices(m: _C.MatrixLayout, tiles: Tensor) -> Tensor:
        """int64 [tiles, 32, lines]: the book that each row's codes of a line are in."""
        words = tiles[:, m.choice_offset :].contiguous().view(torch.int32).view(m.tiles, -1, _C.TILE_ROWS)
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=tiles.device)
        choices = words[..., None] >> shifts & 3  # [tiles, words, 32, 16]
        return choices.transpose(1, 2).reshape(m.tiles, _C.TILE_ROWS, -1)[..., : m.lines].long()


class PackedExperts:
    """The packed experts of one layer on one tier: ids are global, 0..num_experts-1; they are in host memory."""

    def __init__(
        self, layout: ExpertLayout, num_experts: int, resident: Sequence[int] | None = None, nodes: Sequence[int] = ()
    ) -> None:
        """Memory comes zeroed from the arena. resident: ids held here, each once; None = all of them. nodes: NUMA nodes
        that each expert is divided over by output rows; none = undivided."""
        self.layout = layout
        self.num_experts = num_experts
        self.resident: tuple[int, ...] = tuple(range(num_experts)) if resident is None else tuple(sorted(resident))
        self._held = frozenset(self.resident)
        self.weights = _C.ExpertWeights(layout._c, num_experts, list(self.resident), list(nodes))

    @property
    def bits_per_weight(self) -> float:
        return self.layout.bits_per_weight

    @property
    def divided(self) -> bool:
        return self.weights.shards > 1

    def blob(self, expert: int) -> Tensor:
        """uint8 [blob_bytes], a view that keeps the memory alive. KeyError if the expert is not resident, ValueError if
        it is divided."""
        self._check(expert)
        return torch.from_numpy(self.weights.blob(expert))

    def pieces(self, expert: int) -> list[tuple[int, Tensor]]:
        """What the blob is made of, whether or not it is divided: (offset in the blob, uint8 view of the memory).
        KeyError if the expert is not resident."""
        self._check(expert)
        return [(offset, torch.from_numpy(memory)) for offset, memory in self.weights.pieces(expert)]

    def read(self, expert: int) -> Tensor:
        """A copy of the blob, uint8 [blob_bytes], whether or not it is divided. KeyError if it is not resident."""
        self._check(expert)
        blob = torch.empty(self.layout.blob_bytes, dtype=torch.uint8)
        self.weights.read(expert, blob.numpy())
        return blob

    @contextmanager
    def filling(self, expert: int) -> Iterator[Tensor]:
        """A blob to write the whole expert into: its memory or, if it is divided, a buffer that is copied there in the
        end unless an exception is raised. KeyError if it is not resident."""
        if not self.divided:
            yield self.blob(expert)
            return
        self._check(expert)
        blob = PackedExperts(self.layout, 1).blob(0)  # in huge pages: twice as fast as torch.empty
        yield blob
        self.weights.write(expert, blob.numpy())

    def set(self, expert: int, gate: Tensor, up: Tensor, down: Tensor, scales: Scales | None = None) -> None:
        """Packs one expert's weights; see ExpertLayout.pack_into."""
        with self.filling(expert) as blob:
            self.layout.pack_into(blob, gate, up, down, scales)

    def _check(self, expert: int) -> None:
        if expert not in self._held:
            raise KeyError(f"expert {expert} is not resident: {len(self.resident)} of {self.num_experts} experts are")

    def dequantize(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored, by the scalar truth in C++: float32 gate [I, H], up [I, H], down [H, I]."""
        layout, blob = self.layout, (self.read(expert) if self.divided else self.blob(expert)).numpy()
        shapes = ((layout.intermediate, layout.hidden),) * 2 + ((layout.hidden, layout.intermediate),)
        parts = tuple(torch.empty(shape, dtype=torch.float32) for shape in shapes)
        for part, out in enumerate(parts):
            _C.dequantize(layout._c, blob, part, out.numpy())
        return parts


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] float -> E4M3 codes [N, K], fp32 scales [ceil(N/128), ceil(K/128)]: absmax / 448 of each block."""
    block = _C.FP8_BLOCK
    rows, cols = weight.shape
    row_blocks, col_blocks = -(-rows // block), -(-cols // block)
    padded = weight.new_zeros((row_blocks * block, col_blocks * block), dtype=torch.float32)
    padded[:rows, :cols] = weight
    blocks = padded.view(row_blocks, block, col_blocks, block)
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    scales = torch.where(scales == 0, 1.0, scales)  # a block of zeros
    codes = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view_as(padded)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def pack_experts(
    gate: Tensor, up: Tensor, down: Tensor, method: str = "BF16", scales: Scales | None = None, group: int = 0
) -> PackedExperts:
    """Packs a whole layer: gate, up [E, I, H], down [E, H, I], any dtype pack_into takes -> PackedExperts of E experts.

    FP8 from other dtypes is quantised here, absmax / 448 per 128 x 128 block. scales: for E4M3 sources, fp32 [E, ...].
    group: of INT8 and INT4, 0 = the format's default.
    """
    if gate.dim() != 3:
        raise ValueError(f"gate has shape {list(gate.shape)}, must be [experts, intermediate, hidden]")
    experts, intermediate, hidden = gate.shape
    for name, source, shape in (("up", up, gate.shape), ("down", down, (experts, hidden, intermediate))):
        if source.shape != torch.Size(shape):
            raise ValueError(f"{name} has shape {list(source.shape)}, must be {list(shape)}")
    packed = PackedExperts(ExpertLayout(method, hidden, intermediate, group), experts)
    for expert in range(experts):
        parts = [gate[expert], up[expert], down[expert]]
        block_scales = None if scales is None else [s[expert] for s in scales]
        if method == "FP8" and scales is None and gate.dtype != torch.float8_e4m3fn:
            parts, block_scales = zip(*map(quantize_fp8, parts), strict=True)
        packed.set(expert, *parts, scales=block_scales)
    return packed


def host_array(name: str, tensor: Tensor) -> np.ndarray:
    """The numpy array over a contiguous CPU tensor's memory, bfloat16 as int16. ValueError on any other tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        where = f"on {tensor.device} with strides {tensor.stride()}"
        raise ValueError(f"{name} is {where}, must be a contiguous CPU tensor")
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _host_bytes(name: str, tensor: Tensor) -> np.ndarray:
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, must have two dimensions")
    return host_array(name, tensor.view(torch.uint8) if tensor.is_contiguous() else tensor)
