"""Documents as arrays of token ids: made once by a process of their own, kept in files, packed into batches.

File number n of a split is a function of the seed and n only, so training goes on anywhere with the file and the batch
in it as its position.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hetero_glm5.demo.corpus import KINDS, MIX, documents
from hetero_glm5.demo.tokenizer import PAD, trained_tokenizer
from hetero_glm5.demo.training.kernels import CHUNK, Spans

FILE_TOKENS = 1_000_000
PROMPT_WEIGHT, PROMPT_SHARE = 0.15, 0.25  # of tokens that others write: mean weight, and the share that is looked at
LOOK_AHEAD = 256  # documents that are tried for the rest of a batch


@dataclass
class Batch:
    tokens: Tensor  # [T] int64
    positions: Tensor  # [T], from 0 in each document
    spans: Spans
    rows: Tensor  # [N] rows whose next token is scored, N a multiple of CHUNK
    targets: Tensor  # [N]
    weights: Tensor  # [N], 0 for the filling
    kinds: Tensor  # [N] the kind's number, + len(KINDS) where the prompt's author wrote the target


def load_tokenizer(folder: Path) -> Tokenizer:
    """The trained tokenizer, trained once for the folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda name: trained_tokenizer().save(name))
    return Tokenizer.from_file(str(path))


def write_files(folder: Path, split: str, count: int, seed: int, size: int = FILE_TOKENS) -> None:
    """Files 0..count-1 of `split`; those that exist are kept."""
    tokenizer = load_tokenizer(folder)
    for number in range(count):
        path = file_path(folder, split, number)
        if not path.exists():
            arrays = make_file(tokenizer, split, seed * 100_003 + number, size)
            _replace(path, lambda name, arrays=arrays: _save(name, arrays))


def file_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:04d}.npz"


def _save(name: str, arrays: dict[str, np.ndarray]) -> None:
    with open(name, "wb") as file:
        np.savez(file, **arrays)


def _replace(path: Path, write: Any) -> None:
    temporary = f"{path}.{os.getpid()}"
    write(temporary)
    os.replace(temporary, path)


def make_file(tokenizer: Tokenizer, split: str, seed: int, size: int) -> dict[str, np.ndarray]:
    """About `size` tokens of all kinds, each kind by its share, in random order: tokens, whether the model writes them,
    the documents' ends and kinds."""
    made: list[tuple[int, np.ndarray, np.ndarray]] = []
    for number, kind in enumerate(KINDS):
        total = 0
        for document in documents(kind, split, seed):
            encoded = tokenizer.encode_batch([text for text, _ in document.pieces], add_special_tokens=False)
            ids = np.concatenate([np.array(part.ids, np.uint16) for part in encoded])
            written = [np.full(len(part.ids), own) for part, (_, own) in zip(encoded, document.pieces, strict=True)]
            made.append((number, ids, np.concatenate(written)))
            total += len(ids)
            if total >= MIX[kind] * size:
                break
    made = [made[i] for i in np.random.default_rng(seed).permutation(len(made))]
    return {
        "tokens": np.concatenate([ids for _, ids, _ in made]),
        "written": np.concatenate([written for _, _, written in made]),
        "ends": np.cumsum([len(ids) for _, ids, _ in made]),
        "kinds": np.array([kind for kind, _, _ in made], np.uint8),
    }


class Stream:
    """Batches from the files of one split, `files` of which are read again and again."""

    def __init__(self, folder: Path, split: str, files: int):
        self.folder, self.split, self.files = folder, split, files
        self.number, self.length, self.limits = -1, 0, (0, 0)
        self.packed: list[list[int]] = []
        self.pad = load_tokenizer(folder).token_to_id(PAD)

    def open(self, number: int, length: int, limits: tuple[int, int]) -> int:
        """Reads file `number` once it exists; returns how many batches of `length` tokens it gives. Documents whose
        length lies outside `limits`, or above a batch's, are left out."""
        if (number, length, limits) != (self.number, self.length, self.limits):
            path = file_path(self.folder, self.split, number % self.files)
            while not path.exists():
                time.sleep(1)
            with np.load(path) as arrays:
                self.arrays = {key: arrays[key] for key in arrays}
            self.number, self.length, self.limits = number, length, limits
            self.lengths = np.diff(self.arrays["ends"], prepend=0)
            self.packed = list(self._pack(np.random.default_rng(number)))
        return len(self.packed)

    def _pack(self, rng: np.random.Generator) -> Iterator[list[int]]:
        fits = (self.lengths >= self.limits[0]) & (self.lengths <= min(self.limits[1], self.length))
        waiting = [int(i) for i in rng.permutation(len(self.lengths)) if fits[i]]
        while waiting:
            chosen, room = [], self.length
            for document in waiting[:LOOK_AHEAD]:
                if self.lengths[document] <= room:
                    chosen.append(document)
                    room -= self.lengths[document]
            waiting = [i for i in waiting[:LOOK_AHEAD] if i not in set(chosen)] + waiting[LOOK_AHEAD:]
            if room > self.length // 8 and not waiting:
                return  # the last, too empty
            yield chosen

    def batch(self, index: int) -> Batch:
        """Batch `index` of the open file."""
        ends, spans, at = self.arrays["ends"], [], 0
        tokens = np.full(self.length, self.pad, np.int64)
        written, kinds = np.zeros(self.length, bool), np.zeros(self.length, np.int64)
        positions, scored = np.zeros(self.length, np.int64), np.zeros(self.length, bool)
        for document in self.packed[index]:
            end, count = ends[document], self.lengths[document]
            here, there = slice(at, at + count), slice(end - count, end)
            tokens[here], written[here] = self.arrays["tokens"][there], self.arrays["written"][there]
            kinds[here], positions[here] = self.arrays["kinds"][document], np.arange(count)
            scored[at : at + count - 1] = True
            spans.append((at, int(at + count)))
            at = int(at + count)
        if at < self.length:
            spans.append((at, self.length))
        own = np.roll(written, -1)
        looked = np.random.default_rng((self.number, index)).random(self.length) < PROMPT_SHARE
        rows = np.flatnonzero(scored & (own | looked))
        filling = np.zeros(-len(rows) % CHUNK, np.int64)
        weights = np.where(own[rows], 1.0, PROMPT_WEIGHT / PROMPT_SHARE).astype(np.float32)
        return Batch(
            *(torch.from_numpy(t) for t in (tokens, positions)),
            spans,
            *(
                torch.from_numpy(np.concatenate((t, filling.astype(t.dtype))))
                for t in (rows, np.roll(tokens, -1)[rows], weights, kinds[rows] + len(KINDS) * ~own[rows])
            ),
        )
