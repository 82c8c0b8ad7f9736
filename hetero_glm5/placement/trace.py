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
