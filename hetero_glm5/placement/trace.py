"""Routing traces: which experts each token was routed to, in the order in which an engine computed them.

A trace file is a safetensors file. For T computed rows, L MoE layers and top-k routing it holds
    ids [T, L, k]   uint8, or uint16 above 256 experts; a token's experts, the router's first choice first
    step [T]        int32, the engine step that computed the row, from 0; rows are in order of steps
    request [T]     int32, from 0
    position [T]    int32, of the row in its request
    decode [T]      bool, whether the row was decoded, one to a step; else it is part of a prefill
    layers [L]      int32, the model's numbers of the MoE layers
and, as JSON under the header's key `routing_trace`,
    version         2
    experts         of a layer
    kinds           what each request is about, a text for each
A preempted request is computed again: its positions then come twice, the second time as a prefill.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hetero_glm5.core import UserError

HEADER, VERSION = "routing_trace", 2
AGAIN = "Record it again with hetero-glm5 trace record."


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
        """Writes `path`, of any name. The same trace gives the same bytes. Raises OSError."""
        arrays = {name: np.ascontiguousarray(getattr(self, name), kind) for name, kind in _types(self.experts).items()}
        header = {"version": VERSION, "experts": self.experts, "kinds": self.kinds.tolist()}
        path.write_bytes(save(arrays, {HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises UserError when the file is no trace."""
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path} is no routing trace: {error}. {AGAIN}") from error
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise UserError(f"{path} is no routing trace of version {VERSION}. {AGAIN}")
        experts, kinds = header.get("experts"), header.get("kinds")
        texts = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
        types = {name: array.dtype for name, array in arrays.items()}
        if not isinstance(experts, int) or not texts or types != _types(experts):
            raise UserError(f"{path} is damaged: it holds other arrays than a trace. {AGAIN}")
        trace = cls(**arrays, kinds=np.array(kinds, dtype=str), experts=experts)
        trace._check(path)
        return trace

    def _check(self, path: Path) -> None:
        columns = (self.step, self.request, self.position, self.decode)
        flat = all(array.ndim == 1 for array in (*columns, self.layers, self.kinds))
        whole = flat and self.ids.ndim == 3 and {len(column) for column in columns} == {len(self)}
        within = whole and (
            self.ids.shape[1] == len(self.layers)
            and self.ids.max(initial=0) < self.experts
            and self.request.min(initial=0) >= 0
            and self.request.max(initial=-1) < len(self.kinds)
            and (np.diff(self.step) >= 0).all()
        )
        if not within:
            raise UserError(f"{path} is damaged: its arrays do not fit together. {AGAIN}")


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


def _types(experts: int) -> dict[str, np.dtype]:
    """Of the arrays in a file."""
    whole = dict.fromkeys(("step", "request", "position", "layers"), np.dtype(np.int32))
    return whole | {"ids": np.dtype(np.uint8 if experts <= 256 else np.uint16), "decode": np.dtype(np.bool_)}
