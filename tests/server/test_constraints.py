"""What an answer must match: which fields ask for it, and what then may be said."""

import pytest
import tokenizers

from hetero_glm5.core import RequestError
from hetero_glm5.engine.grammar import Grammars
from hetero_glm5.model_config import DEMO_FOLDER
from hetero_glm5.server.constraints import FIELDS, Constraint, asked_constraint
from hetero_glm5.server.tool_grammar import tool_calls

INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
CALL = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"


@pytest.fixture(scope="module")
def matches():
    """matches(grammar, text): whether it is a whole answer."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{DEMO_FOLDER}/tokenizer.json")
    grammars = Grammars(tokenizer, (tokenizer.token_to_id("<|user|>"),))

    def check(grammar, text: str) -> bool:
        matcher, ids = grammars.matcher(grammar), tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def asked(**fields) -> Constraint | None:
    return asked_constraint({name: fields.get(name) for name in FIELDS})


@pytest.mark.parametrize(
    "fields, right, wrong",
    [
        ({"response_format": {"type": "json_object"}}, '{"b": [1, 2]}', "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": INTEGER}}}, '{"a": 1}', '{"a": "b"}'),
        ({"structured_outputs": {"json": INTEGER, "regex": None}}, '{"a": -4}', "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"choice": ['a "b"', "c\nd"]}}, 'a "b"', "c"),
        ({"guided_json": '{"type": "integer"}'}, "12", "a"),
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"guided_regex": r"\d{2}/[a-z]+\/x|(?s:q.r)"}, "12/ab/x", "12/ab"),
        ({"guided_regex": "a\nb/"}, "a\nb/", "a"),
        ({"guided_grammar": 'start: "{" DIGIT+ "}"\nDIGIT: /[0-9]/'}, "{12}", "12"),
    ],
)
def test_what_matches(matches, fields, right, wrong):
    constraint = asked(**fields)
    assert constraint.source == next(iter(fields))
    plain, thinking, calls = (
        constraint.grammar(),
        constraint.grammar(thinking=True),
        constraint.grammar([TOOL], thinking=True, parallel=False),
    )
    assert matches(plain, right) and not matches(plain, wrong) and not matches(plain, CALL)
    assert matches(thinking, f"Well.</think>{right}") and not matches(thinking, right)
    assert matches(calls, f"Well.</think>\n{right}") and not matches(calls, f"</think>{wrong}")
    assert matches(calls, f"Well.</think>\n{CALL}") and not matches(calls, f"</think>{CALL}{CALL}")


def test_there_may_be_many_choices_and_tools(matches):
    marks = ["", " ", "/", "\n", "\t", '"', "é", "日本", "🙂", "<|x|>", "(?i)", "\\d", "[^a]", "&&", "~", "A|B"]
    texts = [f"label {i}{marks[i % len(marks)]}x" for i in range(1000)]
    choice = asked(guided_choice=texts).grammar()
    for number in (0, 517, *range(980, 1000)):
        assert matches(choice, texts[number]) and not matches(choice, texts[number][:-1])
    where = {"type": "object", "properties": {"where": {"enum": texts}}, "required": ["where"]}
    tools = [{"type": "function", "function": {"name": f"go_{i}", "parameters": where}} for i in range(12)]
    tools += [{"type": "function", "function": {"name": f"do_{i}"}} for i in range(900)]
    calls = tool_calls(tools, thinking=False)
    place = "<arg_key>where</arg_key><arg_value>{}</arg_value>"
    assert matches(calls, f"<tool_call>go_7{place.format(texts[985])}</tool_call><tool_call>do_899</tool_call>")
    assert not matches(calls, f"<tool_call>go_7{place.format('label 1000x')}</tool_call>")


def test_blanks_in_json_end(matches):
    grammar = asked(response_format={"type": "json_object"}).grammar()
    assert matches(grammar, "{" + " " * 60 + "}") and not matches(grammar, "{" + " " * 70 + "}")


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_nothing_is_asked(fields):
    assert asked(**fields) is None


@pytest.mark.parametrize(
    "fields, source, sentence",
    [
        ({"response_format": 5}, "response_format", "response_format is of type NoneType; it must be text, json_obj"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a JSON schema, an object; it has No"),
        ({"guided_json": "{"}, "guided_json", "guided_json is no valid JSON"),
        ({"guided_json": "[1]"}, "guided_json", "needs a JSON schema, an object; it has list"),
        ({"guided_choice": []}, "guided_choice", "needs a list of strings"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "needs a list of strings"),
        ({"guided_regex": 5}, "guided_regex", "needs a regex as a string; it has int"),
        ({"guided_grammar": ""}, "guided_grammar", "needs a grammar as a string"),
        ({"structured_outputs": []}, "structured_outputs", "must be an object"),
        ({"structured_outputs": {}}, "structured_outputs", "must name one of"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "must name one of"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs", "'structural_tag', which is not"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_choice both say"),
    ],
)
def test_refusals_name_the_field(fields, source, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        asked(**fields)
    assert caught.value.param == source


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strng"}}}},
        {"guided_regex": "("},
        {"guided_grammar": "root ::= x"},
    ],
)
def test_what_cannot_be_compiled_names_the_field(matches, fields):
    (source,) = fields
    with pytest.raises(RequestError, match=f"{source} cannot be used as a grammar: ") as caught:
        matches(asked(**fields).grammar(), "")
    assert caught.value.param == source
