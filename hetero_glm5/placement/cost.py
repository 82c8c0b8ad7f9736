"""What a step of routed experts costs: seconds from measured rates.

Rates are taken by the tokens an expert gets, because that decides what bounds it: with few tokens the reading of its
weights, with many the arithmetic. They are kept as seconds for a byte of packed weights, so that one profile serves
experts of other sizes in the same format. A layer takes as long as the slower of its two sides, which work at once:

    host    Σ_e host(tokens_e), plus `host_call` for the copies of rows and the hand-over
    device  Σ_e device(tokens_e), plus `device_call`; and the link, which copies one expert after the other: what is
            resident is computed while the link copies, what is fetched after that
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROOFLINE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Curve:
    """Seconds for a byte of an expert's packed weights, by the tokens that the expert gets: linear between the points,
    constant before the first, proportional to the tokens after the last."""

    tokens: tuple[float, ...]  # rising, above 0
    seconds: tuple[float, ...]

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens of each expert, any shape -> seconds for a byte, the same shape; 0 without tokens."""
        n = np.asarray(tokens, dtype=np.float64)
        inside = np.interp(n, self.tokens, self.seconds)
        return np.where(n > 0, inside * np.maximum(1.0, n / self.tokens[-1]), 0.0)

    @classmethod
    def roofline(cls, bandwidth: float, rate: float, bits: float) -> Curve:
        """bandwidth in bytes/s, rate in FLOP/s, bits of a weight: the slower of reading and of 2 FLOP for each weight
        and token."""
        flops = 2 * 8 / bits  # for a byte and a token
        return cls(ROOFLINE_TOKENS, tuple(max(1 / bandwidth, n * flops / rate) for n in ROOFLINE_TOKENS))


@dataclass(frozen=True)
class Layers:
    """Seconds of each layer's parts in a step, float64 [layers]."""

    host: np.ndarray
    device: np.ndarray  # the link's part included
    link: np.ndarray
    rest: float  # of a layer, beside both

    @property
    def seconds(self) -> np.ndarray:
        return np.maximum(self.host, self.device) + self.rest


@dataclass(frozen=True)
class Costs:
    """Of one model's experts in one format on one machine. Times in seconds."""

    expert: int  # bytes of a packed expert
    host: Curve
    device: Curve
    link: float  # bytes/s from host memory to the device
    host_call: float = 50e-6  # of a layer's host part, whatever its work
    device_call: float = 20e-6  # of a layer's device part
    copy_call: float = 5e-6  # of the copy of one expert
    layer: float = 0.0  # of everything else in a layer, on the device: attention, router, shared expert

    def on_host(self, tokens: np.ndarray) -> np.ndarray:
        """Each expert's seconds on the host, all its cores at work on it; tokens of any shape."""
        return self.host(tokens) * self.expert

    def on_device(self, tokens: np.ndarray) -> np.ndarray:
        return self.device(tokens) * self.expert

    def layers(self, tokens: np.ndarray, resident: np.ndarray, fetched: np.ndarray) -> Layers:
        """Of a step; rows of each expert int64 [layers, experts], and bool of the same shape: what was on the device
        when its layer was routed, and what was then fetched. All else is the host's."""
        used = np.nonzero(tokens)
        rows, here, copied = tokens[used], resident[used], fetched[used]

        def by_layer(seconds: np.ndarray) -> np.ndarray:
            return np.bincount(used[0], seconds, len(tokens))

        on_device = self.on_device(rows)
        host = by_layer(np.where(here | copied, 0.0, self.on_host(rows)))
        link = by_layer(copied * self.copy)
        hits, late = by_layer(on_device * here), by_layer(on_device * copied)
        device = np.maximum(hits, link) + late
        return Layers(host + (host > 0) * self.host_call, device + (device > 0) * self.device_call, link, self.layer)

    @property
    def copy(self) -> float:
        """Of one expert over the link."""
        return self.expert / self.link + self.copy_call
