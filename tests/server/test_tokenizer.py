"""Tokenizer, streaming detokeniser and sampling defaults, on the demo's byte-level tokenizer."""

import json
import random
import threading
import time

import pytest

from hetero_glm5.core import RequestError, UserError
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer

TEXTS = ["", "plain", "今天天气很好 👩‍👩‍👧 Ünïcödé", "<|user|>Hi<|assistant|><think>a</think>\n\n\tb", "\u00a0\u0100Ġ"]


@pytest.fixture(scope="module")
def raw():
    return build_tokenizer(600)


@pytest.fixture(scope="module")
def tokenizer(raw):
    return Tokenizer(raw)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, raw, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == text == raw.decode(ids, skip_special_tokens=False)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_special_tokens_are_single_ids_and_no_bos_is_added(tokenizer, raw):
    assert tokenizer.encode("[gMASK]<sop><|user|>") == [raw.token_to_id(t) for t in ("[gMASK]", "<sop>", "<|user|>")]


def test_any_tokens_stream_to_what_decode_gives(tokenizer, raw):
    draw = random.Random(5)
    for _ in range(200):
        ids = [draw.randrange(raw.get_vocab_size() + 20) for _ in range(draw.randrange(30))]
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        known = [token for token in ids if token < raw.get_vocab_size()]
        assert "".join(pieces) == tokenizer.decode(ids) == raw.decode(known, skip_special_tokens=False)


def test_a_character_comes_whole(tokenizer):
    ids = tokenizer.encode("👩")
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["👩"]
    stream.push(ids[0])
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "content, sentence",
    [(None, "cannot be read"), ("{", "is no tokenizer"), ('{"model": 1}', "is no tokenizer")],
)
def test_bad_tokenizer_is_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        Tokenizer.from_folder(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path, raw):
    data = json.loads(raw.to_str()) | {"decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="ByteLevel"):
        Tokenizer.from_folder(tmp_path)


def test_chat_needs_a_template(tmp_path, raw):
    (tmp_path / "tokenizer.json").write_text(raw.to_str())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a")
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}], None)


def test_sampling_defaults(tmp_path):
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_p": 0.95, "top_k": null, "do_sample": true}')
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults(0.6, 0.95, 0)
    path.write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false}')
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults(0.0, 0.9, 0), "greedy"


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ('{"temperature": "hot"}', "temperature is 'hot'; it must be a number"),
        ('{"temperature": true}', "temperature is True; it must be a number"),
        ('{"top_k": 2.5}', "top_k is 2.5; it must be a whole number"),
        ('{"top_p": 2}', "top_p is 2; it must be above 0"),
        ('{"do_sample": "no"}', "do_sample is 'no'; it must be true or false"),
    ],
)
def test_sampling_defaults_that_cannot_work(tmp_path, settings, sentence):
    (tmp_path / "generation_config.json").write_text(settings)
    with pytest.raises(UserError, match=f"generation_config.json: {sentence}"):
        SamplingDefaults.from_folder(tmp_path)


def test_sampling_settings_without_effect_are_told_once(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = {"repetition_penalty": 1.05, "min_p": 0.1, "num_beams": 2, "typical_p": 0.9, "eos_token_id": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    defaults = SamplingDefaults.from_folder(tmp_path)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.05, 0.1)
    (line,) = caplog.messages
    assert line.endswith("generation_config.json: typical_p 0.9, num_beams 2: no effect in this server.")


def test_a_text_that_cannot_fit_is_refused_unencoded(tokenizer, raw):
    longest = max(len(tokenizer.token_bytes(token)) for token in raw.get_vocab().values())
    assert tokenizer.encode("a" * 10 * longest, 10)
    with pytest.raises(RequestError, match=f"has {10 * longest + 1} bytes; the context length is 10 tokens of at most"):
        tokenizer.encode("a" * (10 * longest + 1), 10)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"U\+D83D at character 1"):
        tokenizer.encode("a\ud83d")


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer):
    encoding = threading.Thread(target=tokenizer.encode, args=("word " * 400_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20
