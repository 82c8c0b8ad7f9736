from __future__ import annotations

import json

import pytest
from tiny import tiny_checkpoint

from hetero_glm5.demo.tokenizer import CONTROL, build_tokenizer

TEXTS = ["", "Hello, world!\n", "  two spaces\tand a tab", "天气很好 🙂", "naïve café", "\x00\x7f", "a\r\nb"]


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
