"""Routing that looks like GLM-5's, made from a seed.

A token's score for an expert is a sum of normal deviates that live longer and shorter, and the k highest of a layer
are its experts:

    base       of the layer, for ever
    topic      until the user turns to another of `topics`, on average after `topic_tokens` decoded tokens
    passage    of the user, fading with a memory of PASSAGE tokens; `recency` scales it
    token      Gumbel noise: without the rest, k experts drawn by softmax

The deviations are fitted to the GLM-5.2 profile of github.com/doramirdor/mbolt (1,270 decoded tokens on 10 topics: 7.42
bits of entropy, the mean of 75 layers; the 10, 26, 30, 51, 128 most used experts of a layer take 17, 33, 36, 50, 82 %
of its uses; the first layers are flatter). With `recency` 1 neighbouring tokens share a quarter of their experts and
least-recently-used caches of an eighth and of a quarter of a layer hit half and three quarters; with 0 neighbours share
9 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_glm5.placement.trace import Steps

BASE, TOPIC, PASSAGE_SCALE = (0.87, 0.97), (0.82, 1.03), 1.5  # deviations at recency 0 and 1
PASSAGE = 20.0
TINY = np.float32(1e-30)
FLAT, FLAT_LAYERS = 0.65, 0.15  # all deviations in the first layer, rising to 1 over this share of the layers


@dataclass(frozen=True)
class Conversations:
    """`users` each ask one request after the other. A step prefills one whole prompt, or decodes a token of each user.
    Lengths of prompts and answers are uniform in these ranges of tokens."""

    layers: int = 75
    experts: int = 256
    top_k: int = 8
    users: int = 1
    topics: int = 16
    topic_tokens: float = 256.0
    recency: float = 1.0
    prompt: tuple[int, int] = (256, 768)
    answer: tuple[int, int] = (128, 384)
    seed: int = 0
    fields: tuple[float, float, float] | None = None  # deviations of base, topic and passage, if not those of `recency`

    @property
    def deviations(self) -> tuple[float, float, float]:
        base, topic = (low + (high - low) * self.recency for low, high in (BASE, TOPIC))
        return self.fields or (base, topic, PASSAGE_SCALE * self.recency)

    def steps(self, count: int) -> Steps:
        """The first `count` steps; the same for the same seed."""
        rng = np.random.default_rng(self.seed)
        scale = np.minimum(1, FLAT + (1 - FLAT) * np.arange(self.layers) / (FLAT_LAYERS * self.layers))[:, None]
        base, topic, passage = self.deviations
        shape = (self.layers, self.experts)
        fields = [
            (deviation * scale * rng.standard_normal((number, *shape))).astype(np.float32)
            for deviation, number in ((base, 1), (topic, self.topics))
        ]
        users = [
            _User(self, fields[0] + fields[1], (passage * scale).astype(np.float32), child)
            for child in rng.spawn(self.users)
        ]
        decode = np.zeros((count, *shape), dtype=np.uint16)
        prefill: dict[int, np.ndarray] = {}
        rows = np.zeros(count, dtype=np.int64)
        for step in range(count):
            asking = next((user for user in users if not user.left), None)
            if asking is not None:
                prefill[step] = asking.ask()
                continue
            for user in users:
                user.answer(decode[step])
            rows[step] = len(users)
        return Steps(decode, prefill, rows)


class _User:
    def __init__(self, wanted: Conversations, topics: np.ndarray, passage: np.ndarray, rng: np.random.Generator):
        self.wanted, self.topics, self.scale, self.rng = wanted, topics, passage, rng
        self.topic = topics[rng.integers(len(topics))]
        self.passage = rng.standard_normal(topics.shape[1:], dtype=np.float32)
        self.left = 0  # tokens of the answer

    def ask(self) -> np.ndarray:
        """Rows of a prompt, uint16 [layers, experts]."""
        counts = np.zeros(self.topic.shape, dtype=np.uint16)
        for _ in range(self.rng.integers(*self.wanted.prompt, endpoint=True)):
            self._route(counts)
        self.left = int(self.rng.integers(*self.wanted.answer, endpoint=True))
        return counts

    def answer(self, counts: np.ndarray) -> None:
        """Adds the row of the next token to counts [layers, experts]."""
        if self.rng.random() * self.wanted.topic_tokens < 1:
            self.topic = self.topics[self.rng.integers(len(self.topics))]
        self._route(counts)
        self.left -= 1

    def _route(self, counts: np.ndarray) -> None:
        shape, k = counts.shape, self.wanted.top_k
        keep = np.float32(np.exp(-1 / PASSAGE))
        self.passage *= keep
        self.passage += np.sqrt(1 - keep * keep) * self.rng.standard_normal(shape, dtype=np.float32)
        noise = -np.log(self.rng.standard_exponential(shape, dtype=np.float32) + TINY)  # Gumbel
        scores = self.topic + self.scale * self.passage + noise
        chosen = np.argpartition(scores, -k, axis=1)[:, -k:]
        counts[np.arange(shape[0])[:, None], chosen] += 1
