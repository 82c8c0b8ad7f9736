"""What one machine was measured to do: `hetero-glm5 bench machine` writes it, `costs` reads a model's times from it.

A profile is a JSON object:
    format       1
    cpu, isa     names; threads: of the host experts
    gpu          name of the device, null if there was none
    versions     of hetero_glm5 and torch, by name
    host         by weight format {"tokens": [...], "seconds": [...]}: a cost.Curve, all threads at work on an expert
    device       the same of the device, {} without one
    link         bytes/s from pinned memory to the device, null without one
    host_call    seconds of a layer's host part, whatever its work
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hetero_glm5.core import UserError
from hetero_glm5.placement.cost import Costs, Curve

FORMAT = 1
AGAIN = "Measure again with hetero-glm5 bench machine."


@dataclass(frozen=True)
class Profile:
    cpu: str
    isa: str
    threads: int
    gpu: str | None
    versions: dict[str, str]
    host: dict[str, Curve]
    device: dict[str, Curve]
    link: float | None
    host_call: float

    def costs(self, method: str, expert: int) -> Costs:
        """Of experts of `expert` bytes in that weight format. Raises UserError if it was not measured."""
        if self.link is None:
            raise UserError(
                f"the profile of {self.cpu} was measured without a CUDA device, so it knows no link. Measure where the "
                "device is: hetero-glm5 bench machine."
            )
        for tier, curves in (("host", self.host), ("device", self.device)):
            if method not in curves:
                raise UserError(
                    f"the profile of {self.cpu} has no {method} on the {tier}, only {', '.join(curves) or 'nothing'}. "
                    f"Measure it: hetero-glm5 bench machine --methods {method}."
                )
        return Costs(expert, self.host[method], self.device[method], self.link, host_call=self.host_call)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises UserError on what `save` did not write."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is no machine profile: {error}. {AGAIN}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT or sorted(data) != sorted(names):
            raise UserError(f"{path} is no machine profile of format {FORMAT}. {AGAIN}")
        for tier in ("host", "device"):
            curves = data[tier] if isinstance(data[tier], dict) else {"": None}
            data[tier] = {method: _curve(f"{path}: {tier} {method}", curve) for method, curve in curves.items()}
        profile = cls(**data)
        if not profile._sound:
            raise UserError(f"{path} is damaged: its values do not fit together. {AGAIN}")
        return profile

    @property
    def _sound(self) -> bool:
        versions = list(self.versions.values()) if isinstance(self.versions, dict) else [None]
        texts = [self.cpu, self.isa, "" if self.gpu is None else self.gpu, *versions]
        rates = [self.host_call] if self.link is None else [self.host_call, self.link]
        whole = bool(self.host) and (self.link is None) == (not self.device) and type(self.threads) is int
        return whole and all(map(_positive, rates)) and all(isinstance(text, str) for text in texts)


def _curve(where: str, data: Any) -> Curve:
    points: list[Any] = [data.get("tokens"), data.get("seconds")] if isinstance(data, dict) and len(data) == 2 else []
    if not points or not all(isinstance(part, list) and part and all(map(_positive, part)) for part in points):
        raise UserError(f"{where} is no curve of positive tokens and seconds. {AGAIN}")
    tokens, seconds = points
    if len(tokens) != len(seconds) or any(a >= b for a, b in zip(tokens, tokens[1:], strict=False)):
        raise UserError(f"{where}: tokens must rise, with a number of seconds for each. {AGAIN}")
    return Curve(tuple(map(float, tokens)), tuple(map(float, seconds)))


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
