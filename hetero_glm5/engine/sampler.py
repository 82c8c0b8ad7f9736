"""Chooses each row's token.

A row's logits pass, in this order: repetition penalty, frequency and presence penalty, logit_bias, the end tokens that
min_tokens forbids, the grammar's mask. At temperature 0 the best is taken, the first of equals. Else follow
temperature, min_p, top_k, top_p, and one draw by inverting the CDF.

The draw's uniform number is a function of the sequence's seed and the position alone, and no row's arithmetic involves
another's: a seeded request gives the same tokens whatever else is in the batch and however it was chunked, preempted
or drafted for. A draft is accepted if it is the token drawn, which for drafts that are argmaxes is the rejection rule
(accept d with chance p(d), else draw from p without d): drafting leaves the distribution as it is.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import Batch, Chunk, Drawn, Grammar, RequestError, SamplingParams, Sequence
from hetero_glm5.engine.grammar import Constraint, Grammars, Vocabulary
from hetero_glm5.engine.scheduler import INVALID_TOKEN

FEW = 256  # candidates nearly always hold top_k and top_p; sorting 150,000 takes 10 ms on a CPU core
BLOCK = 32  # rows of prompt log-probabilities at a time
MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15

Row = tuple[Chunk, int]  # one that draws, and how many of the chunk's drafts it assumes


class Sampler:
    """Draws for the sequences that it was told of by `prepare`, until `forget`. `eos` are the model's end tokens;
    without `vocabulary` no grammar can be used."""

    def __init__(self, eos: tuple[int, ...], vocabulary: Vocabulary | None, vocab_size: int):
        self.eos, self.vocab_size = eos, vocab_size
        self._grammars = Grammars(vocabulary, eos) if vocabulary is not None and eos else None
        self._shaping: dict[Sequence, Shaping | None] = {}

    def compile(self, grammar: Grammar) -> None:
        """What takes long of `prepare`, to be done before it on any thread: some 0.1 s for 100 kB of schema, at
        worst four seconds of a core. Raises RequestError."""
        self._compiler(grammar).matcher(grammar)

    def _compiler(self, grammar: Grammar) -> Grammars:
        if self._grammars is None:
            raise RequestError("a grammar needs a tokenizer and an end token.", grammar.param)
        return self._grammars

    def prepare(self, seq: Sequence) -> None:
        """Compiles the sequence's grammar, unless that was done lately. Raises RequestError."""
        params = seq.params
        wrong = [token for token in params.logit_bias if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(
                f"logit_bias holds {wrong[0]}; ids lie between 0 and {self.vocab_size - 1}.", "logit_bias"
            )
        constraint = None
        if params.grammar is not None:
            constraint = Constraint(self._compiler(params.grammar), params.grammar, self.vocab_size)
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else self.eos)]
        needed = constraint or params.min_tokens or params.logit_bias or _penalised(params)
        self._shaping[seq] = Shaping(seq, ends, constraint) if needed else None

    def close(self) -> None:
        if self._grammars is not None:
            self._grammars.close()

    def forget(self, seq: Sequence) -> None:
        self._shaping.pop(seq, None)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, batch: Batch) -> list[list[Drawn]]:
        """For each chunk of the batch what its rows drew, up to the first token that differs from its draft; nothing
        where nothing is due, INVALID_TOKEN alone where a row among these cannot be drawn from. `logits`, fp32
        [rows that draw, vocab], are changed by what shapes them."""
        rows = [(chunk, ahead) for chunk in batch.chunks for ahead in range(chunk.num_draws)]
        if not rows:
            return [[] for _ in batch.chunks]
        best = greatest(logits)
        finite = logits.gather(-1, best).isfinite()
        asking = {i: c.seq.params.logprobs for i, (c, _) in enumerate(rows) if c.seq.params.logprobs is not None}
        unmodified = logits[list(asking)] if asking else None
        errors: dict[int, str] = {}
        if any(self._shaping[chunk.seq] for chunk, _ in rows):
            errors = self._shape(logits, batch)
            best = greatest(logits)
            finite &= logits.gather(-1, best).isfinite()  # everything may be forbidden
        tokens = _choose(logits, best, rows)[:, 0]
        drawn = [Drawn(token) for token in tokens.where(finite[:, 0], INVALID_TOKEN).tolist()]
        if unmodified is not None:
            details = _logprobs(unmodified, tokens[list(asking)], max(asking.values()))
            for (i, top), detail in zip(asking.items(), details, strict=True):
                drawn[i] = Drawn(drawn[i].token, detail.logprob, detail.top[:top])
        for i, one in enumerate(drawn):
            if i in errors or one.token == INVALID_TOKEN:
                drawn[i] = Drawn(INVALID_TOKEN, error=errors.get(i))
        rest = iter(drawn)
        return [_accepted(chunk, list(islice(rest, chunk.num_draws))) for chunk in batch.chunks]

    def _shape(self, logits: Tensor, batch: Batch) -> dict[int, str]:
        """Changes the logits in place; returns what went wrong, by row."""
        errors, row = {}, 0
        for chunk in batch.chunks:
            after = row + chunk.num_draws
            shaping = self._shaping[chunk.seq]
            if shaping is not None and after > row:
                errors.update({row + at: error for at, error in shaping(logits[row:after], chunk.drafts).items()})
            row = after
        return errors


def _accepted(chunk: Chunk, drawn: list[Drawn]) -> list[Drawn]:
    if not drawn:
        return []
    right = next((i for i, draft in enumerate(chunk.drafts) if drawn[i].token != draft), len(chunk.drafts))
    return [drawn[right]] if drawn[right].token == INVALID_TOKEN else drawn[: right + 1]


class Shaping:
    """What changes one sequence's logits before the draw."""

    def __init__(self, seq: Sequence, ends: list[int], constraint: Constraint | None):
        self._seq, self._ends, self._constraint = seq, ends, constraint
        self._penalties: Penalties | None = None

    def __call__(self, logits: Tensor, drafts: tuple[int, ...]) -> dict[int, str]:
        """Changes logits [1 + drafts, vocab] of the rows that follow seq.tokens + drafts[:row], in place. Returns what
        the grammar could not judge, by row."""
        seq, params = self._seq, self._seq.params
        if _penalised(params):
            self._penalties = self._penalties or Penalties(seq, logits)
            self._penalties(logits, drafts)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits.index_add_(1, ids, logits.new_tensor([list(params.logit_bias.values())]).expand(len(logits), -1))
        early = params.min_tokens - seq.num_output
        if early > 0 and self._ends:
            logits[:early, self._ends] = -torch.inf
        if self._constraint is None:
            return {}
        masks, error = self._constraint.allowed(seq, drafts)
        for row, mask in zip(logits, masks, strict=False):
            row.masked_fill_(torch.from_numpy(~mask).to(logits.device), -torch.inf)
        return {len(masks): error} if error else {}


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


class Penalties:
    """One sequence's tokens, counted as they come."""

    def __init__(self, seq: Sequence, like: Tensor):
        self._seq, self._known = seq, seq.num_prompt
        self._counts = like.new_zeros(like.shape[-1])  # of output tokens
        self._prompt = torch.zeros_like(self._counts, dtype=torch.bool)
        self._prompt[seq.tokens[: seq.num_prompt]] = True

    def __call__(self, logits: Tensor, drafts: tuple[int, ...]) -> None:
        """Changes logits [1 + drafts, vocab] in place."""
        params = self._seq.params
        new = torch.tensor(self._seq.tokens[self._known :], dtype=torch.int64, device=logits.device)
        self._counts.index_add_(0, new, torch.ones_like(new, dtype=self._counts.dtype))
        self._known = len(self._seq.tokens)
        counts = self._counts.repeat(len(logits), 1)
        for row, token in enumerate(drafts, 1):
            counts[row:, token] += 1
        used = counts > 0
        rate = params.repetition_penalty
        punished = torch.where(logits > 0, logits / rate, logits * rate)
        logits.copy_(torch.where(used | self._prompt, punished, logits))
        logits.sub_(params.frequency_penalty * counts + params.presence_penalty * used)


def _choose(logits: Tensor, best: Tensor, rows: list[Row]) -> Tensor:
    """Tokens [rows, 1]: `best` of the greedy rows, draws of the others."""
    vocab = logits.shape[-1]
    groups: dict[bool, list[int]] = {}
    settings: dict[bool, list[tuple[float, ...]]] = {}
    for i, (chunk, ahead) in enumerate(rows):
        seq, p = chunk.seq, chunk.seq.params
        if p.temperature > 0:
            truncated = p.top_p < 1 or 0 < p.top_k < vocab
            number = uniform(seq.seed, len(seq.tokens) + ahead)
            groups.setdefault(truncated, []).append(i)
            settings.setdefault(truncated, []).append((p.temperature, p.min_p, p.top_k or vocab, p.top_p, number))
    tokens = best.clone() if groups else best
    for truncated, group in groups.items():
        at = torch.tensor(group, device=logits.device)
        table = torch.tensor(settings[truncated], dtype=torch.float64, device=logits.device)
        chosen = logits if len(group) == len(rows) else logits.index_select(0, at)
        tokens.index_copy_(0, at, (_draw_truncated if truncated else _draw)(chosen, table))
    return tokens


def _draw(logits: Tensor, settings: Tensor) -> Tensor:
    """Tokens [rows, 1] from logits [rows, vocab] under settings [rows, (temperature, min_p, top_k, top_p, uniform)],
    of which top_k and top_p are off."""
    return _invert(_chances(logits, settings), settings[:, 4:])


def _draw_truncated(logits: Tensor, settings: Tensor, width: int = FEW) -> Tensor:
    """The same with top_k (the vocabulary's size means off) and top_p, among the `width` likeliest tokens at first."""
    vocab = logits.shape[-1]
    top_k, top_p, number = settings[:, 2:].split(1, -1)
    ids = _best(logits, min(width, vocab))
    chances = _chances(logits, settings).gather(-1, ids)
    chances = chances.masked_fill(torch.arange(ids.shape[-1], device=ids.device) >= top_k, 0)
    mass = chances.cumsum(-1)
    held = mass[:, -1:]
    needed = top_p * held.where(top_k < vocab, 1)  # top_p is a share of what top_k leaves
    chances = chances.masked_fill(mass - chances >= needed, 0)  # the likeliest always stays
    tokens = ids.gather(-1, _invert(chances, number))
    if width < vocab:
        short = (top_k > width) & ((top_k < vocab) | (held < top_p))
        if short.any():
            at = short[:, 0].nonzero()[:, 0]
            tokens.index_copy_(0, at, _draw_truncated(logits[at], settings[at], vocab))
    return tokens


def _chances(logits: Tensor, settings: Tensor) -> Tensor:
    """fp64 [rows, vocab] under temperature and min_p."""
    temperature, min_p = settings[:, :2].split(1, -1)
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature  # at most 0: nothing can overflow
    return scaled.masked_fill(scaled < min_p.log(), -torch.inf).softmax(-1)


def _invert(chances: Tensor, number: Tensor) -> Tensor:
    """Where [rows, 1] the cumulated chances [rows, n] pass `number` [rows, 1], of at most 1 - 2**-53, of their total: a
    product that rounding leaves below the total, so that what has no chance is not reached."""
    mass = chances.cumsum(-1)
    at = torch.searchsorted(mass, number * mass[:, -1:], right=True)
    return at.clamp_(max=mass.shape[-1] - 1)  # NaN is past the end


def greatest(logits: Tensor) -> Tensor:
    """Ids [rows, 1] of the greatest logits, the first of equals; NaN counts as the greatest."""
    if logits.is_cuda:
        return logits.argmax(-1, keepdim=True)
    return torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))  # as for _best


def _best(logits: Tensor, count: int) -> Tensor:
    """Ids [rows, count] of the greatest logits, best first; of equals, the lowest id first, whatever the algorithm and
    the count."""
    vocab = logits.shape[-1]
    bits = logits.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = ascending.long() * 2**32 - torch.arange(vocab, device=logits.device)  # none equals another
    if logits.is_cuda:
        return keys.topk(count, -1).indices
    # numpy is ten times as fast as torch, whose threads wait for each other beside the host pool's.
    found = np.partition(keys.numpy(), min(vocab - count, vocab - 1), -1)[:, vocab - count :]
    return torch.from_numpy(-np.sort(found, -1)[:, ::-1] & (2**32 - 1))  # a key's lower half is -id


def uniform(seed: int, position: int) -> float:
    """In [0, 1): the number `position` of a SplitMix64 generator that starts at the mixed seed."""
    return (_mix(_mix(seed + GOLDEN) + position * GOLDEN) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, targets: Tensor, top: int) -> list[Drawn]:
    """For each row of logits, fp32 [T, vocab], the log-probability of its target [T] and the `top` likeliest tokens."""
    blocks = zip(logits.split(BLOCK), targets.split(BLOCK), strict=True)
    return [one for rows, tokens in blocks for one in _logprobs(rows, tokens, top)]


def _logprobs(logits: Tensor, tokens: Tensor, top: int) -> list[Drawn]:
    table = logits.log_softmax(-1)
    ids = _best(logits, min(top, logits.shape[-1]))
    columns = (tokens, table.gather(-1, tokens[:, None])[:, 0], ids, table.gather(-1, ids))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Drawn(token, own, tuple(zip(best, values, strict=True))) for token, own, best, values in rows]
