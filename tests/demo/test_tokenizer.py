from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint

from hetero_glm5.demo.corpus import render, tasks
from hetero_glm5.demo.tokenizer import CONTROL, TRAINED_VOCAB, build_tokenizer, trained_tokenizer

TEXTS = ["", "Hello, world!\n", "  two spaces\tand a tab", "天气很好 🙂", "naïve café", "\x00\x7f", "a\r\nb"]


@pytest.fixture(scope="module")
def trained():
    return trained_tokenizer()


@pytest.mark.parametrize("vocab", [292, 512, 100_000])
def test_round_trip_at_every_size(vocab):
    tokenizer = build_tokenizer(vocab)
    assert tokenizer.get_vocab_size() <= vocab
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_each_in_glm5s_order():
    tokenizer = build_tokenizer(512)
    ids = [tokenizer.token_to_id(token) for token in CONTROL]
    assert len(CONTROL) == 36
    assert ids == list(range(512 - 36, 512))
    assert tokenizer.encode("".join(CONTROL)).ids == ids
    assert tokenizer.encode("a<think>b").ids[1:2] == [tokenizer.token_to_id("<think>")]


def test_same_size_same_file():
    assert build_tokenizer(600).to_str() == build_tokenizer(600).to_str()


def test_checkpoint_ids_name_the_special_tokens(checkpoints):
    from transformers import AutoTokenizer

    folder = tiny_checkpoint(checkpoints)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for file in ("config.json", "generation_config.json"):
        config = json.loads((folder / file).read_text())
        names = tokenizer.convert_ids_to_tokens(config["eos_token_id"])
        assert names == ["<|endoftext|>", "<|user|>", "<|observation|>"]
        assert tokenizer.convert_ids_to_tokens(config["pad_token_id"]) == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("x < y").input_ids) == "x < y"


def test_trained_ids(trained):
    assert trained.get_vocab_size() == TRAINED_VOCAB and TRAINED_VOCAB % 64 == 0
    ids = [trained.token_to_id(token) for token in CONTROL]
    assert ids == list(range(TRAINED_VOCAB - len(CONTROL), TRAINED_VOCAB))
    assert trained.encode("".join(CONTROL)).ids == ids


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_trained_round_trip(trained, text):
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [*TEXTS, "".join(CONTROL), "٣४", "ǅ ʰ a\u0301 \u200d", "a  b   ", "\n\n\n"])
def test_trained_round_trip_of_odd_texts(trained, text):
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_a_digit_is_a_token(trained):
    tokens = [trained.id_to_token(i) for i in range(TRAINED_VOCAB - len(CONTROL))]
    assert [token for token in tokens if any(digit in token for digit in "0123456789")] == list("0123456789")
    assert trained.encode("27+45=").tokens == list("27+45=")


def test_a_name_has_the_same_tokens_everywhere(trained):
    for name in ("Paris", "Zorvandoo", "Kraitimash"):
        alone = trained.encode(name).tokens
        for before, after in (("in ", "?"), ("<arg_value>", "</arg_value>"), ('{"name": "', '"}'), ("", " keeps")):
            tokens = trained.encode(before + name + after).tokens
            assert any(tokens[i : i + len(alone)] == alone for i in range(len(tokens)))


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_recall_tasks_have_the_wanted_length(trained, tokens):
    lengths = [len(trained.encode(render(t.messages, thinking=False)).ids) for t in tasks("recall", 25, 3, tokens)]
    assert all(length == pytest.approx(tokens, rel=0.04) for length in lengths)
    assert sum(lengths) / len(lengths) == pytest.approx(tokens, rel=0.015)


@pytest.mark.slow
def test_two_processes_train_the_same(trained, tmp_path):
    code = "import sys; from hetero_glm5.demo.tokenizer import *; trained_tokenizer().save(sys.argv[1])"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=environment)
        assert json.loads((tmp_path / seed).read_text()) == json.loads(trained.to_str())
