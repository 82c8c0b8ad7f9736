"""Routing traces: which experts each token was routed to, in the order in which an engine computed them.

A trace file is what numpy.savez_compressed writes, and holds, for T computed rows, L MoE layers and top-k routing,
    ids [T, L, k]   uint8, or uint16 above 256 experts; a token's experts, the router's first choice first
    step [T]        int32, the engine step that computed the row, from 0; rows are in order of steps
    request [T]     int32, from 0
    position [T]    int32, of the row in its request
    decode [T]      bool, whether the row was decoded, one to a step; else it is part of a prefill
    layers [L]      int32, the model's numbers of the MoE layers
    kinds [R]       text, what each request is about
    experts         int32, experts of a layer
    version         int32, 1
A preempted request is computed again: its positions then come twice, the second time as a prefill.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetero_glm5.core import UserError

VERSION = 1


@dataclass(frozen=True)
class Trace:
    ids: np.ndarray
    step: np.ndarray
    request: np.ndarray
    position: np.ndarray
    decode: np.ndarray
    layers: np.ndarray
    kinds: np.ndarray
    experts: int

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: Path) -> None:
        """Writes `path`, which need not end in .npz."""
        arrays = dict(vars(self))
        arrays |= {name: arrays[name].astype(np.int32) for name in ("step", "request", "position", "layers")}
        arrays["ids"] = self.ids.astype(np.uint8 if self.experts <= 256 else np.uint16)
        arrays |= {"experts": np.int32(self.experts), "version": np.int32(VERSION)}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises UserError when the file is no trace."""
        try:
            with np.load(path) as file:
                arrays: dict[str, Any] = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(
                f"{path} is no routing trace: {error}. Record one with hetero-glm5 trace record."
            ) from error
        version = arrays.pop("version", None)
        wanted = set(cls.__dataclass_fields__)
        if version != VERSION or set(arrays) != wanted:
            raise UserError(
                f"{path} is no routing trace of version {VERSION}: it has version {version} and "
                f"{', '.join(sorted(arrays)) or 'nothing'}. Record it again with hetero-glm5 trace record."
            )
        trace = cls(**arrays | {"experts": int(arrays["experts"])})
        trace._check(path)
        return trace

    def _check(self, path: Path) -> None:
        rows = {name: len(getattr(self, name)) for name in ("ids", "step", "request", "position", "decode")}
        whole = len(set(rows.values())) == 1 and self.ids.ndim == 3 and self.ids.shape[1] == len(self.layers)
        within = whole and (
            self.ids.max(initial=0) < self.experts
            and self.request.max(initial=-1) < len(self.kinds)
            and (np.diff(self.step) >= 0).all()
        )
        if not within:
            raise UserError(f"{path} is damaged: its arrays do not fit together. Record it again.")


@dataclass(frozen=True)
class Steps:
    """A trace as planners see it: how many rows of each step each expert got. decode uint16 [steps, layers, experts];
    prefill has one uint16 [layers, experts] for each step with prefill rows."""

    decode: np.ndarray
    prefill: dict[int, np.ndarray]
    rows: np.ndarray  # int [steps], decoded

    def __len__(self) -> int:
        return len(self.decode)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """decode, prefill of each step, int64 [layers, experts]."""
        nothing = np.zeros(self.decode.shape[1:], dtype=np.int64)
        for step, decode in enumerate(self.decode):
            yield decode.astype(np.int64), self.prefill.get(step, nothing).astype(np.int64)

    @property
    def timed(self) -> np.ndarray:
        """bool [steps], whether a step decodes and does nothing else."""
        timed = self.rows > 0
        timed[list(self.prefill)] = False
        return timed

    @classmethod
    def of(cls, trace: Trace) -> Steps:
        count = int(trace.step.max(initial=-1)) + 1
        shape = (count, len(trace.layers), trace.experts)

        def counts(rows: np.ndarray) -> np.ndarray:
            result = np.zeros(shape, dtype=np.uint16)
            step, layer = trace.step[rows, None, None], np.arange(shape[1])[:, None]
            np.add.at(result, (step, layer, trace.ids[rows].astype(np.int64)), 1)
            return result

        prefill = counts(~trace.decode)
        with_prefill = np.unique(trace.step[~trace.decode]).tolist()
        return cls(
            counts(trace.decode),
            {step: prefill[step] for step in with_prefill},
            np.bincount(trace.step[trace.decode], minlength=count),
        )
