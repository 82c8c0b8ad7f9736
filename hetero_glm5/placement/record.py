"""The expert-distribution recorder: what is routed between a start and a dump, and how much of it the device tier held.

Names and keys are those of SGLang's recorder in its mode `stat`, which KTransformers extends by a flag. A dump is a .pt
file as in stats.py, the steps summed; with --record-kt-gpu-expert-distribution it also holds

    gpu_expert_masks                      bool [steps, layers, experts]: what the device held in each of the last steps
    gpu_decode_count, gpu_prefill_count   int64 [layers, experts]: the selections that found their expert there
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from hetero_glm5.core import RequestError, UserError
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.stats import PHASE_KEYS, PHASES, RoutingStats, all_layers, save_tensors

_START = "POST /start_expert_distribution_record"


class DistributionRecorder:
    """`folder`: where dumps go; it is made. `masks`: of how many steps the device's experts are kept, -1 = all; None =
    they are not recorded. The engine's thread owns it. Raises UserError."""

    def __init__(self, model: ModelConfig, folder: str, masks: int | None = None):
        self.model, self.folder, self.masks = model, Path(folder).absolute(), masks
        self.recording = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--expert-distribution-recorder-dir {folder} cannot be made: {error.strerror}. Name another folder."
            ) from error
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self._routed, self._hits = RoutingStats(self.model), RoutingStats(self.model)
        self._masks: deque[np.ndarray] = deque(maxlen=None if self.masks == -1 else self.masks)

    def start(self) -> None:
        """Forgets what was recorded and records. Raises RequestError."""
        if self.recording:
            raise RequestError(
                "The expert distribution is being recorded already. Send POST /stop_expert_distribution_record first, "
                "and POST /dump_expert_distribution_record to keep what was recorded."
            )
        self._reset()
        self.recording = True

    def stop(self) -> None:
        """What was recorded is kept. Raises RequestError."""
        if not self.recording:
            raise RequestError(f"The expert distribution is not being recorded; {_START} starts it.")
        self.recording = False

    def observe(self, decode: np.ndarray, prefill: np.ndarray, on_device: np.ndarray) -> None:
        """A step's counts, int64, and which experts a layer found on the device when it was routed, bool; [MoE layers,
        experts] each."""
        if not self.recording:
            return
        self.steps += 1
        self._routed.add(decode, prefill)
        if self.masks is not None:
            self._hits.add(decode * on_device, prefill * on_device)
            self._masks.append(on_device.copy())

    @property
    def hit_rate(self) -> dict[str, float | None] | None:
        """{decode, prefill}: of the selections recorded, the share that found their expert on the device, None without
        any; None if that is not recorded."""
        if self.masks is None:
            return None
        both = zip(PHASES, self._hits.tokens, self._routed.tokens, strict=True)
        return {phase: hits / routed if routed else None for phase, hits, routed in both}

    def dump(self) -> dict[str, Any]:
        """Writes what was recorded and goes on from zero: {file, steps, tokens: {decode, prefill}}, and with `masks`
        hit_rate, null without tokens: {decode, prefill}. Raises RequestError, and OSError, after which nothing is
        lost."""
        if not self.steps:
            what = "no step was computed since recording began" if self.recording else f"{_START} starts a recording"
            raise RequestError(f"There is nothing to dump: {what}.")
        path = self.folder / f"expert_distribution_recorder_{time.time()}.pt"
        tensors, tokens = self._routed.tensors, self._routed.tokens
        told = {"file": str(path), "steps": self.steps, "tokens": dict(zip(PHASES, map(round, tokens), strict=True))}
        if self.masks is not None:
            held = self._hits.tensors
            tensors |= {f"gpu_{name}": held[name] for name in PHASE_KEYS}
            tensors["gpu_expert_masks"] = all_layers(np.stack(self._masks), self.model)
            told["hit_rate"] = self.hit_rate
        save_tensors(path, tensors)
        self._reset()
        return told
