"""How many tokens to draft: as many as pay, by what has been measured. Plain Python.

A step of R rows takes T(R) seconds; drafting the next token of S sequences takes D(S). With a_j, the share of j-th
drafts that were right where those before them were, S sequences with d drafts each give S·(1 + a_1 + a_1·a_2 + …)
tokens in T(S·(1 + d)) + d·D(S) seconds. The depth with the most tokens a second is used. A depth that has not been
tried counts as costing nothing more than the depth below it, so that it is tried; and once in PROBE steps a
neighbouring depth is used, so that no figure grows stale (seldomer if drafting does not pay at all).

Only ratios of times matter, and they last longer than the times: other work slows the machine, contexts grow. So all
times are divided by the pace: what the latest steps took, to T of their rows. A step of as many rows as the one before
tells of the pace, any other, and the first few of a size, of T.
"""

from __future__ import annotations

from collections import deque

PROBE, PROBE_FROM_NONE = 32, 128
RECONSIDER = 8  # steps for which a choice holds
TIMES, PACES = 15, 3  # of so many the median counts
ACCEPT_FORGET = 0.99
PRIOR = 0.7, 4.0  # of acceptance: mean, and how many observations that is worth


class Median:
    """Of the latest `count` values; what delays a step is seldom the step's own."""

    def __init__(self, count: int) -> None:
        self._latest: deque[float] = deque(maxlen=count)

    @property
    def full(self) -> bool:
        return len(self._latest) == self._latest.maxlen

    def add(self, value: float) -> None:
        self._latest.append(value)
        self.value = sorted(self._latest)[len(self._latest) // 2]


class DraftDepth:
    """At most `most` drafts. Feed it every step that only decodes."""

    def __init__(self, most: int):
        self.most = most
        self._rows: dict[int, Median] = {}  # T
        self._drafts: dict[int, Median] = {}  # D
        self._pace = Median(PACES)
        self._pace.add(1.0)
        self._latest = 0  # rows of the latest step
        self._right = [PRIOR[0] * PRIOR[1]] * most
        self._tried = [PRIOR[1]] * most
        self._steps = 0
        self._chosen = -1, 0  # for how many sequences, and the depth

    def stepped(self, rows: int, seconds: float) -> None:
        """A step of so many rows, decoded and drafted ones, took so long."""
        usual = self._rows.setdefault(rows, Median(TIMES))
        if rows != self._latest or not usual.full:
            usual.add(seconds / self._pace.value)
        else:
            self._pace.add(seconds / usual.value)
        self._latest = rows

    def drafted(self, sequences: int, depth: int, seconds: float) -> None:
        """Drafting `depth` tokens for so many sequences took so long."""
        self._drafts.setdefault(sequences, Median(TIMES)).add(seconds / depth / self._pace.value)

    def verified(self, drafts: int, accepted: int) -> None:
        """Of a sequence's drafts the first so many were right."""
        for j in range(min(accepted + 1, drafts)):
            self._tried[j] = ACCEPT_FORGET * self._tried[j] + 1
            self._right[j] = ACCEPT_FORGET * self._right[j] + (j < accepted)

    @property
    def acceptance(self) -> list[float]:
        """Of the drafts at each depth, the share that is right if those before are."""
        return [right / tried for right, tried in zip(self._right, self._tried, strict=True)]

    def choose(self, sequences: int) -> int:
        """The depth for the next step, in which so many sequences decode."""
        if not self.most:
            return 0
        self._steps += 1
        if self._steps % RECONSIDER == 0 or self._chosen[0] != sequences:
            self._chosen = sequences, max(range(self.most + 1), key=lambda depth: self.rate(sequences, depth))
        best = self._chosen[1]
        if self._steps % (PROBE if best else PROBE_FROM_NONE) == 0:
            return min(best + 1, self.most) if self._steps // PROBE % 2 or not best else best - 1
        return best

    def rate(self, sequences: int, depth: int) -> float:
        """Tokens a second at that depth and a pace of 1, as far as known."""
        run, tokens = 1.0, 1.0
        for share in self.acceptance[:depth]:
            run *= share
            tokens += run
        step = _at(self._rows, sequences * (1 + depth))
        draft = _at(self._drafts, sequences) if depth else 0.0
        return sequences * tokens / (step + depth * draft + 1e-9)


def _at(measured: dict[int, Median], size: int) -> float:
    """The measured value at `size`, interpolated; beyond what is measured, the nearest; 0 if nothing is."""
    below = max((s for s in measured if s <= size), default=None)
    above = min((s for s in measured if s >= size), default=None)
    if below is None or above is None:
        nearest = above if below is None else below
        return 0.0 if nearest is None else measured[nearest].value
    low, high = measured[below].value, measured[above].value
    return low if above == below else low + (high - low) * (size - below) / (above - below)
