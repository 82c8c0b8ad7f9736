"""Serves a model's tensors from its checkpoint (its experts from elsewhere, if asked), and tells how far it is.

Everything is checked against the name table before the first byte of data is read. The MTP layer may be in the
checkpoint without being wanted; it is then neither needed nor read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hetero_glm5.core import LoadProgress
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.expert_source import (
    CheckpointExperts,
    ExpertSource,
    MappedExperts,
    StoredExperts,
    checkpoint_layout,
)
from hetero_glm5.weights.expert_store import ExpertStore
from hetero_glm5.weights.names import TensorSpec, expected_tensors, expert_tensors
from hetero_glm5.weights.quantize import ExpertLayout

Report = Callable[[LoadProgress], None]
SECONDS_BETWEEN_REPORTS = 0.1
SAMPLE_BYTES = 4096


class ModelWeights:
    """Opens and checks. Raises CheckpointError. The routed experts come from `experts`: a packed store, or another
    checkpoint folder; None: from `folder`, like the rest."""

    def __init__(
        self, config: ModelConfig, folder: str, *, experts: ExpertStore | str | None = None, mtp: bool = False,
        report: Report = lambda progress: None,
    ):  # fmt: skip
        self.config = config
        self.layers = range(config.num_hidden_layers + mtp)
        self._dense = Checkpoint(folder)
        if experts is None or experts == folder:
            self._experts: Checkpoint | ExpertStore = self._dense
        else:
            self._experts = Checkpoint(experts) if isinstance(experts, str) else experts
        known = self._known = expected_tensors(config, mtp=config.num_nextn_predict_layers > 0 or mtp)
        needed = expected_tensors(config, mtp)
        routed: dict[str, TensorSpec] = {}
        for layer in self.layers:
            routed |= expert_tensors(config, layer)
        self._routed = list(routed)
        dense = {name: spec for name, spec in needed.items() if name not in routed}
        if self._experts is self._dense:
            self._dense.check(needed, known)
        else:
            self._dense.check(dense, known)
        self.dense_bytes = sum(self._dense.num_bytes(name) for name in dense)
        if isinstance(self._experts, Checkpoint):
            if self._experts is not self._dense:
                self._experts.check(routed, known)
            self.expert_bytes = sum(self._experts.num_bytes(name) for name in routed)
        else:
            sparse = [layer for layer in self.layers if config.is_sparse(layer)]
            self._experts.check(config, sparse, self._dense)
            self.expert_bytes = self._experts.num_bytes(sparse)
        self._checked = self._bytes_read  # for the checks alone
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

    @property
    def quantised_as(self) -> str:
        """FP8 or INT4 if the experts are a checkpoint's and all of them that, else empty."""
        return self._experts.common_method(self._routed) if isinstance(self._experts, Checkpoint) else ""

    def layout(self, method: str) -> ExpertLayout:
        """How the experts are packed, or would be as `method`."""
        if isinstance(self._experts, Checkpoint):
            return checkpoint_layout(self._experts, self.config, method)
        return self._experts.layout

    @property
    def mappable(self) -> bool:
        """Whether the experts can stay in files."""
        return isinstance(self._experts, ExpertStore)

    def experts(self, layout: ExpertLayout, *, mapped: bool = False, on_device: int = 0) -> ExpertSource:
        """The routed experts, packed as `layout` (a store's own). `mapped`: a store's experts stay in its files, except
        the `on_device` ones."""
        if isinstance(self._experts, Checkpoint):
            return CheckpointExperts(self._experts, layout)
        if not mapped:
            return StoredExperts(self._experts)
        self.expert_bytes = on_device * layout.blob_bytes
        return MappedExperts(self._experts)

    def fingerprint(self) -> bytes:
        """A hash that changes with the weights: of each file's name, size and time, and of each dense tensor's type,
        shape and first bytes."""
        digest = hashlib.blake2b(digest_size=16)
        entries = self._dense.entries
        for name in sorted(set(entries) - set(self._routed)):
            digest.update(f"{name} {entries[name].dtype} {entries[name].shape}".encode())
            digest.update(self._dense.read_start(name, SAMPLE_BYTES))
        paths = {entry.path for entry in entries.values()}
        if isinstance(self._experts, ExpertStore):
            paths |= {file.path for file in self._experts.files.values()}
        else:
            paths |= {entry.path for entry in self._experts.entries.values()}
        for path in sorted(paths):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.digest()

    @property
    def _bytes_read(self) -> int:
        return self._dense.bytes_read + (self._experts.bytes_read if self._experts is not self._dense else 0)

    @property
    def progress(self) -> LoadProgress:
        total = self.dense_bytes + self.expert_bytes
        return LoadProgress("", self._bytes_read - self._checked, total, time.monotonic() - self._started)

    def tell(self, stage: str) -> None:
        """Reports progress, ten times a second at most."""
        now = time.monotonic()
        if now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = now
            p = self.progress
            self._report(LoadProgress(stage, p.bytes_done, p.bytes_total, p.seconds))


def dense_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
    """Bytes of everything but routed experts once loaded: `dtype`, or fp32 where the name table says so."""
    return sum(
        torch.Size(spec.shape).numel() * (4 if spec.float32 else dtype.itemsize)
        for spec in expected_tensors(config, mtp, routed=False).values()
    )
