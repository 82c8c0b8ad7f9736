import json
import re
from pathlib import Path
from typing import Literal

import pytest
import tokenizers
import torch
from llguidance import LLParserLimits
from pydantic import BaseModel, ConfigDict, Field

from hetero_glm5.core import MOST_GRAMMAR_CHARACTERS, Batch, Chunk, Grammar, RequestError, SamplingParams, Sequence
from hetero_glm5.engine.grammar import COMPILED, Constraint, Grammars
from hetero_glm5.engine.sampler import Sampler
from hetero_glm5.engine.scheduler import INVALID_TOKEN

DEMO = Path(__file__).resolve().parents[2] / "hetero_glm5" / "demo" / "model" / "tokenizer.json"
PADDED = 3072 + 8  # a vocabulary with ids that no token has
TEMPERATURE = 1.5


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(DEMO))


@pytest.fixture(scope="module")
def eos(tokenizer):
    return tuple(map(tokenizer.token_to_id, ("<|endoftext|>", "<|user|>", "<|observation|>")))


@pytest.fixture(scope="module")
def sampler(tokenizer, eos):
    return Sampler(eos, tokenizer, PADDED)


class Model:
    """Random logits of what follows a prefix, better for some tokens."""

    def __init__(self, seed: int, good: list[int] | None = None):
        self.seed, self.good = seed, good or []

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *tokens)) % 2**63)
        logits = torch.randn(PADDED, generator=generator) * 4
        logits[self.good] += 6
        return logits


def generate(sampler, model, grammar, drafts=lambda done: (), **params) -> list[int]:
    """Tokens up to and with an end token, 600 at most. `drafts` gives guesses after the tokens so far."""
    seq = Sequence([1, 2], SamplingParams(grammar=grammar, temperature=TEMPERATURE, seed=model.seed, **params), 2)
    sampler.prepare(seq)
    while seq.num_output < 600 and not set(seq.output) & set(sampler.eos):
        seq.num_computed = len(seq.tokens) - 1
        chunk = Chunk(seq, 1, drafts(seq.output))
        logits = torch.stack([model(seq.tokens + list(chunk.drafts[:i])) for i in range(1 + len(chunk.drafts))])
        ((first, *rest),) = sampler(logits, Batch([chunk]))
        assert first.error is None
        seq.tokens += [first.token, *(one.token for one in rest)]
    sampler.forget(seq)
    ends = [i for i, token in enumerate(seq.output) if token in sampler.eos]
    return seq.output[: ends[0] + 1]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["bolt", "nut", "washer"]
    size: int = Field(ge=-5, le=120)


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    note: str = Field(max_length=12)
    urgent: bool
    parts: list[Part] = Field(min_length=1, max_length=3)
    price: float | None


ORDER = Grammar("json_schema", json.dumps(Order.model_json_schema()))


def test_answers_are_json_that_the_schema_allows(sampler, tokenizer, eos):
    quotes = [tokenizer.encode(text).ids[0] for text in ('"', "}", "]", ",", ".")]
    orders, ends = [], set()
    for seed in range(20):
        *answer, end = generate(sampler, Model(seed, quotes), ORDER)
        orders.append(Order.model_validate_json(tokenizer.decode(answer, skip_special_tokens=False), strict=True))
        ends.add(end)
    assert len({order.model_dump_json() for order in orders}) == 20
    assert ends == set(eos), "any end token may end an answer"


@pytest.mark.parametrize(
    "regex", [r"([0-9]{1,3}\.){3}[0-9]{1,3}", r"[a-f]{5,9}(ü|日本)?!", r"(yes|no)", r"-?(0|[1-9][0-9]*)"]
)
def test_answers_match_regular_expressions(sampler, tokenizer, regex):
    answers = [generate(sampler, Model(seed), Grammar("regex", regex))[:-1] for seed in range(8)]
    texts = [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    assert all(re.fullmatch(regex, text) for text in texts) and len(set(texts)) > 1


def test_numbers_are_multiples(sampler, tokenizer):
    schema = {"type": "integer", "multipleOf": 700, "minimum": 1, "maximum": 10**7}
    digits = [tokenizer.encode(digit).ids[0] for digit in "0123456789"]
    answers = [generate(sampler, Model(s, digits), Grammar("json_schema", json.dumps(schema)))[:-1] for s in range(8)]
    numbers = [int(tokenizer.decode(answer)) for answer in answers]
    assert len(set(numbers)) > 4 and not any(number % 700 for number in numbers)


def test_grammars_name_added_tokens_and_strings_hold_none(tokenizer, eos):
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = False
    sampler = Sampler(eos, tokenizers.Tokenizer.from_str(json.dumps(spec)), PADDED)
    tools = Grammar(
        "lark",
        r"""
        start: <think> /[a-z ]{3,20}/ </think> <tool_call> ("search" | "open") argument </tool_call>
        argument: <arg_key> "q" </arg_key> <arg_value> text </arg_value>
        text: %json {"type": "string", "maxLength": 9}
        """,
    )
    name, key = "<tool_call>(search|open)", "<arg_key>q</arg_key>"
    shape = f'<think>[a-z ]{{3,20}}</think>{name}{key}<arg_value>(".*")</arg_value></tool_call>'
    added = [tokenizer.token_to_id(tag) for tag in re.findall(r"</?[a-z_]+>", shape)]
    for seed in range(8):
        answer = generate(sampler, Model(seed, added), tools)[:-1]  # those are the likeliest everywhere
        match = re.fullmatch(shape, tokenizer.decode(answer, skip_special_tokens=False))
        assert match and len(json.loads(match[2])) <= 9
        assert [token for token in answer if token in added] == added


@pytest.mark.parametrize("grammar", [ORDER, Grammar("regex", "[ab]{3,6}c*")], ids=["json", "regex"])
def test_drafts_change_nothing(sampler, grammar):
    model = Model(5)
    right = generate(sampler, model, grammar, top_k=40)
    steps = []

    def guess(done: list[int]) -> tuple[int, ...]:
        steps.append(len(done))
        drafts = right[len(done) :][:4]
        if len(steps) % 3 == 1:
            drafts[-1] = 3000  # most likely forbidden
        return tuple(drafts) if len(steps) % 3 else (*drafts, 7, 7)  # and sometimes beyond the end

    assert generate(sampler, model, grammar, guess, top_k=40) == right
    assert len(steps) <= len(right) / 2, "most drafts were accepted"


def test_after_the_end_only_an_end_token_follows(sampler, eos):
    seq = Sequence([1], SamplingParams(grammar=Grammar("regex", "a"), temperature=0.0), 1)
    sampler.prepare(seq)
    a = sampler._grammars._tokenizer.tokenize_str("a")[0]
    logits = torch.zeros(4, PADDED)
    logits[:, 8] = 9.0
    drawn = sampler(logits, Batch([Chunk(seq, 1, (a, min(eos), 8))]))[0]
    assert [one.token for one in drawn] == [a, min(eos), min(eos)]


@pytest.mark.parametrize(
    ("grammar", "param", "words"),
    [
        (("json_schema", '{"type": "objekt"}'), "response_format", "Invalid type: objekt"),
        (("json_schema", '{"type": '), "response_format", "EOF while parsing"),
        (("json_schema", '{"type": "object", "propertyNames": {}}'), "response_format", "propertyNames"),
        (("json_schema", '{"$ref": "http://example.com/x"}'), "response_format", "not present"),
        (("json_schema", "\ud800"), "response_format", "not JSON"),
        (("regex", "a("), "grammar", "unclosed group"),
        (("lark", "start: other"), "grammar", "unknown name"),
        (("lark", "start: <nobody>"), "grammar", "unknown special token"),
    ],
)
def test_grammars_that_do_not_compile(sampler, grammar, param, words):
    seq = Sequence([1], SamplingParams(grammar=Grammar(*grammar)), 1)
    with pytest.raises(RequestError, match=words) as error:
        sampler.prepare(seq)
    assert error.value.param == param and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar("yacc", "x"), "of kind 'yacc'; it must be one of json_schema, regex, lark"),
        (lambda: Grammar("regex", 3), "the grammar is 3"),
        (lambda: Grammar("regex", "a" * (MOST_GRAMMAR_CHARACTERS + 1)), "500001 characters; at most 500000"),
        (lambda: SamplingParams(grammar=Grammar("regex", "a"), min_tokens=2), "min_tokens is 2; it must be 0 with"),
        (lambda: SamplingParams(grammar=Grammar("regex", "a"), ignore_eos=True), "ignore_eos is True; .* False with"),
    ],
)
def test_grammars_that_cannot_be(make, words):
    with pytest.raises(RequestError, match=words):
        make()


def test_a_grammar_needs_a_tokenizer_and_an_end(tokenizer):
    seq = Sequence([1], SamplingParams(grammar=Grammar("regex", "a")), 1)
    for vocabulary, eos in ((None, (1,)), (tokenizer, ())):
        with pytest.raises(RequestError, match="needs a tokenizer and an end token"):
            Sampler(eos, vocabulary, PADDED).prepare(seq)


def test_grammars_are_compiled_once_and_the_oldest_are_dropped(tokenizer, eos):
    grammars = Grammars(tokenizer, eos)
    compiled = []
    first, *others = (Grammar("regex", f"a{{{i}}}") for i in range(1, COMPILED + 2))
    for grammar in (first, *others[:-1], first, others[-1], first, others[0]):
        matcher = grammars.matcher(grammar)
        assert not matcher.is_accepting() and matcher.consume_tokens(grammars._tokenizer.tokenize_str("a"))
        compiled.append(grammars._compiled.cache_info().misses)
    assert compiled == [*range(1, COMPILED + 1), COMPILED, COMPILED + 1, COMPILED + 1, COMPILED + 2]


def test_blanks_come_to_an_end(sampler, tokenizer):
    matcher = sampler._grammars.matcher(Grammar("json_schema", '{"type": "array"}'))
    (blank,) = tokenizer.encode(" ").ids
    matcher.consume_tokens(tokenizer.encode("[").ids)
    assert matcher.validate_tokens([blank] * 80) == 64


def test_a_matcher_that_cannot_go_on_fails_its_request_alone(sampler):
    lost = Sequence([1, 9, 9], SamplingParams(grammar=Grammar("regex", "a+"), temperature=0.0), 1)
    other = Sequence([1], SamplingParams(temperature=0.0), 1)
    for seq in (lost, other):
        sampler.prepare(seq)
    logits = torch.zeros(2, PADDED)
    logits[:, 7] = 1.0
    (failed,), (drawn,) = sampler(logits, Batch([Chunk(lost, 3), Chunk(other, 1)]))
    assert failed.token == INVALID_TOKEN and "grammar" in failed.error
    assert drawn.token == 7 and drawn.error is None


def test_a_lexer_that_others_filled_is_made_anew(tokenizer, eos, monkeypatch):
    monkeypatch.setattr(
        "hetero_glm5.engine.grammar_trial.LIMITS", LLParserLimits(max_lexer_states=400, verbose_errors=False)
    )
    grammars, grammar = Grammars(tokenizer, eos), Grammar("regex", "([a-z]{1,50}[0-9]){1,200}")
    made = []
    renew = grammars.renew
    monkeypatch.setattr(grammars, "renew", lambda grammar: made.append(1) or renew(grammar))
    for seed in range(4):
        seq, constraint = Sequence([1], SamplingParams(), 1), Constraint(grammars, grammar, PADDED)
        random = torch.Generator().manual_seed(seed)
        for _ in range(100):
            (mask,), error = constraint.allowed(seq, ())
            assert not error
            choices = [token for token in mask.nonzero()[0].tolist() if token not in eos]
            seq.tokens.append(choices[int(torch.randint(len(choices), (), generator=random))])
    assert made


class Tired:
    """A matcher that allows everything and meets a limit after two tokens."""

    def __init__(self, consumed: int = 0):
        self.consumed = consumed

    def deep_copy(self):
        return Tired(self.consumed)

    def consume_token(self, token):
        self.consumed += 1

    def consume_tokens(self, tokens):
        self.consumed += len(tokens)

    def compute_bitmask(self):
        return b"\xff"

    def is_error(self):
        return self.consumed >= 2

    def get_error(self):
        return "too\ncomplex"


class TiredGrammars:
    def matcher(self, grammar):
        return Tired()


def test_a_limit_met_while_drafting_counts_only_where_it_is_reached():
    seq = Sequence([1], SamplingParams(), 1)
    constraint = Constraint(TiredGrammars(), Grammar("regex", ""), 8)
    for _ in range(2):
        masks, error = constraint.allowed(seq, (3, 4, 5))
        assert len(masks) == 2 and all(mask.all() for mask in masks) and error.endswith("gave up: too complex")
    assert constraint.allowed(seq, (3,))[1] == ""
    seq.tokens += [3, 4]
    assert constraint.allowed(seq, ())[0] == []
