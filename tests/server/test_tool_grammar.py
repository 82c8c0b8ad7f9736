"""Whatever the model would rather say, what the grammars let through is a call the parser reads, or JSON."""

import json
from pathlib import Path

import jsonschema
import pytest
import tokenizers
import torch

from hetero_glm5.core import Batch, Chunk, RequestError, SamplingParams, Sequence
from hetero_glm5.engine.sampler import Sampler
from hetero_glm5.server.parsers import OutputParser, ParsedMessage
from hetero_glm5.server.tool_grammar import json_answer, named, tool_calls

DEMO = Path(__file__).resolve().parents[2] / "hetero_glm5" / "demo" / "model" / "tokenizer.json"
TAGS = ("</think>", "</tool_call>", "</arg_value>", "<|user|>")
PARAMETERS = {
    "find": {
        "type": "object",
        "properties": {
            "what": {"type": "string"},
            "count": {"type": "integer"},
            "kind": {"type": "string", "enum": ["a b", 'c"d']},
            "either": {"type": ["boolean", "null"]},
        },
        "required": ["what", "kind"],
    },
    "list_all": {"type": "object", "properties": {}},
    "put": {
        "type": "object",
        "properties": {"points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1}},
        "required": ["points"],
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    },
    "bare": None,
}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in PARAMETERS.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(DEMO))


def answer(tokenizer, grammar, seed: int) -> str:
    """What random logits give, to which ending things is likelier than going on."""
    eos = tuple(map(tokenizer.token_to_id, ("<|endoftext|>", "<|user|>", "<|observation|>")))
    vocab = tokenizer.get_vocab_size()
    sampler = Sampler(eos, tokenizer, vocab)
    seq = Sequence([1], SamplingParams(grammar=grammar, seed=seed), 1)
    sampler.prepare(seq)
    generator = torch.Generator().manual_seed(seed)
    tags = [tokenizer.token_to_id(tag) for tag in TAGS]
    closing = [i for i in range(vocab) if tokenizer.id_to_token(i) in ('"', "}", "]", '"}', "]}", "}]")]
    while seq.num_output < 400:
        logits = torch.randn(1, vocab, generator=generator) * 2
        logits[:, tags] += 9
        logits[:, closing] += 6
        ((drawn,),) = sampler(logits, Batch([Chunk(seq, 1)]))
        assert drawn.error is None
        if drawn.token in eos:
            return tokenizer.decode(seq.output, skip_special_tokens=False)
        seq.num_computed = len(seq.tokens)
        seq.tokens.append(drawn.token)
    raise AssertionError("endless")


def parsed(text: str, thinking: bool) -> ParsedMessage:
    parser, message = OutputParser(thinking=thinking, reasoning=True, tools=TOOLS), ParsedMessage()
    message.add(parser.feed(text))
    message.add(parser.finish())
    return message


@pytest.mark.parametrize("thinking", [False, True])
def test_calls_are_valid_and_nothing_else(tokenizer, thinking):
    seen = set()
    grammar = tool_calls(TOOLS, thinking=thinking)
    for seed in range(25):
        message = parsed(answer(tokenizer, grammar, seed), thinking)
        assert message.calls and not (message.content or "").strip()
        for name, arguments in message.calls:
            jsonschema.validate(json.loads(arguments), PARAMETERS[name] or {"maxProperties": 0})
            seen.add(name)
    assert seen >= {"find", "list_all", "put"}


def test_one_call_only_and_only_the_named(tokenizer):
    grammar = tool_calls(named(TOOLS, "find"), thinking=False, parallel=False)
    for seed in range(10):
        ((name, _),) = parsed(answer(tokenizer, grammar, seed), False).calls
        assert name == "find"
    with pytest.raises(RequestError, match="tool_choice names 'fnd'"):
        named(TOOLS, "fnd")


def test_only_what_refers_to_a_schemas_parts_holds_them():
    point = {"point": {"type": "object"}}
    properties = {"a": {"type": "integer"}, "b": {"type": "array", "items": {"$ref": "#/$defs/point"}}}
    tool = {"function": {"name": "f", "parameters": {"properties": properties, "$defs": point}}}
    a, b = tool_calls([tool], thinking=False).text.splitlines()[-2:]
    assert "$defs" not in a and json.dumps(point) in b


def test_grammars_that_grow_too_long_are_given_up_at_once():
    """The whole one would have gigabytes."""
    parts = {f"d{i}": {"type": "integer", "description": "x" * 100} for i in range(2000)}
    properties = {f"p{i}": {"type": "integer", "allOf": [{"$ref": "#/$defs/d0"}]} for i in range(20_000)}
    tool = {"function": {"name": "f", "parameters": {"properties": properties, "$defs": parts}}}
    with pytest.raises(RequestError, match="grammar for tools has more than 500000 characters") as caught:
        tool_calls([tool], thinking=False)
    assert caught.value.param == "tools"


@pytest.mark.parametrize("thinking", [False, True])
def test_json_comes_after_the_reasoning(tokenizer, thinking):
    for seed in range(10):
        message = parsed(answer(tokenizer, json_answer(PARAMETERS["find"], thinking=thinking), seed), thinking)
        jsonschema.validate(json.loads(message.content), PARAMETERS["find"])
        assert not message.calls
