"""How often each expert will be used soon, learned from how often it was.

An expert's past is a few rates of use, averaged over half-lives from a step or two to thousands, and its share of the
latest prefills. What it will do in the next HORIZON steps is a weighted sum of these:

    expected uses = Σ_i w_i · rate_i        w = argmin Σ |uses - w·rates|² + RIDGE·|w - w0|²

The weights are the same for all experts and are refitted each HORIZON steps from what then happened, older windows
counting less. So the forecast is recency where recency rules, frequency where routing stands still, a mixture
elsewhere, and trusts a prefill as far as prefills have been right; nobody has to choose.
"""

from __future__ import annotations

import numpy as np

HORIZON = 32  # steps
HALF_LIVES = (1, 4, 16, 64, 256, 2048)  # steps of decode
PREFILL_HALF_LIVES = (64, 512)  # steps of decode after the prefill
FORGET = 0.95  # of the older windows' weight, at each fit
RIDGE = 1.0  # uses


class Forecast:
    """Of `layers` × `experts`. `expected` float32 [layers, experts]: uses in the next HORIZON decode steps."""

    def __init__(self, layers: int, experts: int):
        half_lives = np.array([*HALF_LIVES, *PREFILL_HALF_LIVES], dtype=np.float32)
        features = len(half_lives)
        self.expected = np.zeros((layers, experts), dtype=np.float32)
        self._keep = (0.5 ** (1 / half_lives))[:, None, None]
        self._rates = np.zeros((features, layers, experts), dtype=np.float32)
        self._then = self._rates.copy()  # the rates when the window began
        self._uses = np.zeros((layers, experts), dtype=np.float32)  # in the window
        self._steps = 0  # of the window
        self._prior = np.full(features, HORIZON / features)
        self._weights = self._prior
        self._squares = np.zeros((features, features))
        self._products = np.zeros(features)

    def observe(self, decode: np.ndarray, prefill: np.ndarray) -> None:
        """Rows routed to each expert in a step, int64 [layers, experts], of its decode and of its prefill."""
        decay, rates = len(HALF_LIVES), self._rates
        if prefill.any():
            most = prefill.sum(axis=1, keepdims=True)
            rates[decay:] += (1 - self._keep[decay:]) * (prefill / np.maximum(most, 1)) * prefill.shape[1]
        if decode.any():
            used = decode > 0
            rates *= self._keep
            rates[:decay] += (1 - self._keep[:decay]) * used
            self._uses += used
            self._steps += 1
            if self._steps == HORIZON:
                self._fit()
        np.einsum("f,fle->le", self._weights.astype(np.float32), rates, out=self.expected)

    def _fit(self) -> None:
        then = self._then.reshape(len(self._then), -1)
        self._squares = FORGET * self._squares + then @ then.T
        self._products = FORGET * self._products + then @ self._uses.ravel()
        ridge = RIDGE * np.eye(len(then))
        self._weights = np.linalg.solve(self._squares + ridge, self._products + ridge @ self._prior)
        self._then = self._rates.copy()
        self._uses[:] = 0
        self._steps = 0
