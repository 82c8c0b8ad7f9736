"""Perplexity against float64 arithmetic, and against transformers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import LATENT_EPS, oracle_logits
from tiny import tiny_checkpoint

from hetero_glm5.demo.corpus import KINDS
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import DEMO_FOLDER
from hetero_glm5.quality.perplexity import BLOCK, Loss, losses, losses_by_kind, token_losses, total
from hetero_glm5.quality.texts import Text, held_out
from hetero_glm5.server.tokenizer import Tokenizer


class Fixed:
    """An LLM that answers with given logits."""

    def __init__(self, logits):
        self._logits = logits

    def logits(self, ids):
        return self._logits[: len(ids)]


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 3 * BLOCK])
def test_token_losses_are_float64s(length):
    generator = torch.Generator().manual_seed(length)
    logits = 10 * torch.randn(length, 50, generator=generator)
    ids = torch.randint(0, 50, (length,), generator=generator).tolist()
    wide = logits.numpy().astype(np.float64)
    want = [np.log(np.exp(row - row.max()).sum()) + row.max() - row[i] for row, i in zip(wide, ids[1:], strict=False)]
    assert token_losses(logits, ids).tolist() == pytest.approx(want, rel=1e-12)


def test_the_models_own_tokens_count_from_the_start_on():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    ids, own = [3, 1, 4, 1, 5, 8], [True, False, True, True, False, True]
    each = token_losses(logits, ids).tolist()  # each[i - 1] is that of position i
    llm, text = Fixed(logits), Text("sums", ids, own)
    for start, counted in ((1, [1, 2, 4]), (3, [2, 4]), (6, [])):
        own, whole = losses(llm, text, start)
        assert own == Loss(pytest.approx(sum(each[i] for i in counted)), len(counted))
        assert whole == Loss(pytest.approx(sum(each[start - 1 :])), 6 - start)
    both = losses_by_kind(llm, [text, Text("chats", ids, [True] * 6), text])
    assert both == {"sums": Loss(pytest.approx(2 * (each[1] + each[2] + each[4])), 6), "chats": both["chats"]}
    assert both["chats"] == Loss(pytest.approx(sum(each)), 5) and total(both.values()).tokens == 11


def test_perplexity_is_the_number_of_equally_likely_tokens():
    text = Text("sums", [0] * 20, [True] * 20)
    assert losses(Fixed(torch.zeros(20, 17)), text)[1].perplexity == pytest.approx(17, rel=1e-12)
    assert math.isnan(Loss().perplexity) and Loss(1e6, 1).perplexity == math.inf


def difference(folder, tokens: int, longest: int) -> float:
    """The largest difference to transformers' perplexity over documents of every kind."""
    exact = {"device": "cpu", "dtype": "float32", "latent_norm_eps": LATENT_EPS, "max_total_tokens": 4096}
    tokenizer = Tokenizer.from_folder(folder)
    texts = [text for kind in KINDS for text in held_out(tokenizer, kind, 0, tokens, longest)]
    with LLM(folder, **exact) as llm:
        got = losses_by_kind(llm, texts)
    want = {kind: Loss() for kind in KINDS}
    for text in texts:
        own = torch.tensor(text.own[1:])
        logits, targets = oracle_logits(folder, text.ids)[:-1][own], torch.tensor(text.ids[1:])[own]
        want[text.kind] += Loss(F.cross_entropy(logits.double(), targets, reduction="sum").item(), len(targets))
    assert all(got[kind].tokens == want[kind].tokens for kind in KINDS) and total(got.values()).tokens > 100
    return abs(total(got.values()).perplexity / total(want.values()).perplexity - 1)


def test_fp32_is_transformers(checkpoints):
    """Documents are longer than index_topk 16, so what the indexer selects counts too."""
    assert difference(tiny_checkpoint(checkpoints), tokens=1, longest=120) <= 1e-4


@pytest.mark.skipif(not DEMO_FOLDER.exists(), reason="the package was built without the demo model")
def test_fp32_is_transformers_on_the_demo_model():
    assert difference(DEMO_FOLDER, tokens=300, longest=1200) <= 1e-4
