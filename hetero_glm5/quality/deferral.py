"""Expert deferral on and off, to see what it costs in quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hetero_glm5.llm import LLM


@contextmanager
def deferring(llm: LLM, count: int) -> Iterator[None]:
    """`llm` defers `count` host experts of each token, as with --kt-max-deferred-experts-per-token."""
    tiers = llm.engine.tiers
    before, tiers.deferred = tiers.deferred, count
    try:
        yield
    finally:
        tiers.deferred = before
