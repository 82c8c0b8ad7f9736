"""Serves a model's tensors from its checkpoint (and the experts from another, if asked), and tells how far it is.

Everything is checked against the name table before the first byte of data is read. The MTP layer may be in the
checkpoint without being wanted; it is then neither needed nor read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hetero_glm5.core import LoadProgress
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError
from hetero_glm5.weights.names import (
    EXPERT_MATRICES,
    TensorSpec,
    expected_tensors,
    expert_prefix,
    expert_tensors,
)

Report = Callable[[LoadProgress], None]
RawExpert = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]  # gate, up, down, FP8 scales
SECONDS_BETWEEN_REPORTS = 0.1


class ModelWeights:
    """Opens and checks. Raises CheckpointError."""

    def __init__(
        self, config: ModelConfig, folder: str, *, experts_folder: str | None = None, mtp: bool = False,
        report: Report = lambda progress: None,
    ):  # fmt: skip
        self.config = config
        self.layers = range(config.num_hidden_layers + mtp)
        self._dense = Checkpoint(folder)
        self._experts = Checkpoint(experts_folder) if experts_folder not in (None, folder) else self._dense
        known = self._known = expected_tensors(config, mtp=config.num_nextn_predict_layers > 0 or mtp)
        needed = expected_tensors(config, mtp)
        routed: dict[str, TensorSpec] = {}
        for layer in self.layers:
            routed |= expert_tensors(config, layer)
        dense = {name: spec for name, spec in needed.items() if name not in routed}
        if self._experts is self._dense:
            self._dense.check(needed, known)
        else:
            self._dense.check(dense, known)
            self._experts.check(routed, known)
        self.dense_bytes = sum(self._dense.num_bytes(name) for name in dense)
        self.expert_bytes = sum(self._experts.num_bytes(name) for name in routed)
        self._report, self._started, self._reported = report, time.monotonic(), 0.0

    def close(self) -> None:
        self._dense.close()
        self._experts.close()

    def getter(self, dtype: torch.dtype, device: str) -> Callable[[str], Tensor]:
        """weights(name) → the tensor, dequantised, on `device` in `dtype`, or in fp32 where the name table says so."""

        def weights(name: str) -> Tensor:
            tensor = self._dense.read(name, torch.float32 if self._known[name].float32 else dtype, device)
            self.tell("dense weights")
            return tensor

        return weights

    def expert(self, layer: int, expert: int) -> RawExpert:
        """One routed expert as stored, on the CPU: gate and up [I, H], down [H, I], and their scales if FP8."""
        names = [f"{expert_prefix(layer, expert)}{matrix}.weight" for matrix in EXPERT_MATRICES]
        scales = tuple(self._experts.read_scales(name) for name in names)
        gate, up, down = self._experts.read_raw(*names)
        if all(scale is None for scale in scales):
            return gate, up, down, None
        if any(scale is None for scale in scales):
            raise CheckpointError(
                f"{expert_prefix(layer, expert)}* mixes FP8 and other types; all three must be alike."
            )
        return gate, up, down, scales

    @property
    def progress(self) -> LoadProgress:
        done = self._dense.bytes_read + (self._experts.bytes_read if self._experts is not self._dense else 0)
        total = self.dense_bytes + self.expert_bytes
        return LoadProgress("", done, total, time.monotonic() - self._started)

    def tell(self, stage: str) -> None:
        """Reports progress, ten times a second at most."""
        now = time.monotonic()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = now
            p = self.progress
            self._report(LoadProgress(stage, p.bytes_done, p.bytes_total, p.seconds))


def dense_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
    """Bytes of everything but routed experts once loaded: `dtype`, or fp32 where the name table says so."""
    layers = range(config.num_hidden_layers + mtp)
    routed = {name for layer in layers for name in expert_tensors(config, layer)}
    return sum(
        torch.Size(spec.shape).numel() * (4 if spec.float32 else dtype.itemsize)
        for name, spec in expected_tensors(config, mtp).items()
        if name not in routed
    )
