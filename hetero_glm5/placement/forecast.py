"""How often each expert will be used soon, learned from how often it was.

An expert's past is a few rates of use, averaged over half-lives from one step to thousands: of decode alone, and of a
history in which the tokens of prefills count as if they had been decoded, because a prompt may tell what its answer
will use, or mislead. What the expert will do in the next HORIZON steps is a weighted sum of these:

    expected uses = Σ_i w_i · rate_i        w = argmin Σ |uses - w·rates|² + |w - w0|²

The weights are the same for all experts and are fitted again every HORIZON steps to what then happened, older windows
counting less. So the forecast is recency where recency rules, frequency where routing stands still and a mixture
elsewhere, and nobody has to choose.
"""

from __future__ import annotations

import numpy as np

HORIZON = 16  # steps
DECODE = np.array([1, 4, 16, 64, 256, 2048])  # half-lives of averages, in steps
BOTH = np.array([32, 256])  # of those in which prefills count
FORGET = 0.95  # what an older window counts, for each newer one


class Forecast:
    """Of `layers` × `experts`. `expected` float32 [layers, experts]: uses in the next HORIZON decode steps, where many
    rows of one step are one use."""

    def __init__(self, layers: int, experts: int):
        count = len(DECODE) + len(BOTH)
        self.expected = np.zeros((layers, experts), dtype=np.float32)
        self._averages = np.zeros((count, layers, experts), dtype=np.float32)
        self._seen = np.zeros(count)  # the averages' weight so far: an average over nothing yet is no rate of 0
        self._usual = float(layers)  # rows that a decode step routes, summed over experts and layers
        self._then: np.ndarray | None = None  # rates when the window began
        self._uses = np.zeros((layers, experts), dtype=np.float32)  # in the window
        self._steps = 0  # of the window
        self._weights = self._prior = np.full(count, HORIZON / count)
        self._squares, self._products = np.zeros((count, count)), np.zeros(count)

    def observe(self, decode: np.ndarray, prefill: np.ndarray) -> None:
        """Rows routed to each expert in a step, int64 [layers, experts], of its decode and of its prefill."""
        if prefill.any():
            steps = prefill.sum() / self._usual
            self._average(np.minimum(prefill / steps, 1), np.r_[0 * DECODE, steps + 0 * BOTH])
        if decode.any():
            self._usual = float(decode.sum())
            used = decode > 0
            self._average(used, np.ones(len(self._seen)))
            self._uses += used
            self._steps += 1
            if self._steps >= HORIZON:
                self._fit()
        rates = self._weights / np.maximum(self._seen, 1e-9)
        np.einsum("f,fle->le", rates.astype(np.float32), self._averages, out=self.expected)

    def _average(self, rate: np.ndarray, steps: np.ndarray) -> None:
        """Each average sees `rate` for so many `steps`."""
        keep = 0.5 ** (steps / np.concatenate((DECODE, BOTH)))
        self._seen = self._seen * keep + 1 - keep
        self._averages *= keep.astype(np.float32)[:, None, None]
        self._averages += (1 - keep).astype(np.float32)[:, None, None] * rate.astype(np.float32)

    def _fit(self) -> None:
        if self._then is not None:
            self._squares = FORGET * self._squares + self._then @ self._then.T
            self._products = FORGET * self._products + self._then @ self._uses.ravel()
            ridge = np.eye(len(self._prior))
            self._weights = np.linalg.solve(self._squares + ridge, self._products + self._prior)
        self._then = (self._averages / self._seen[:, None, None].astype(np.float32)).reshape(len(self._prior), -1)
        self._uses[:], self._steps = 0, 0
