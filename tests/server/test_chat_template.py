"""Chat templates: GLM-5's rendered cases, what is made of messages first, and what goes wrong."""

import json
from pathlib import Path

import pytest

from hetero_glm5.core import RequestError, UserError
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.server.chat_template import ChatTemplate
from hetero_glm5.server.protocol import ChatRequest

VECTORS = json.loads((Path(__file__).parent / "data" / "chat_template.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "Hi"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {}, "test")


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_vectors(case):
    kwargs = {"clear_thinking": True} | case["kwargs"]  # the vectors leave it unset, which means the same
    assert template(CHAT_TEMPLATE).render(case["messages"], case["tools"], kwargs) == case["prompt"]
    asked = ChatRequest(messages=case["messages"], tools=case["tools"], chat_template_kwargs=kwargs)
    told = asked.plain_messages, asked.offered_tools, asked.template_kwargs
    assert template(CHAT_TEMPLATE).render(*told) == case["prompt"], "through a request's fields"


def test_old_reasoning_stays_unless_asked():
    messages = [*USER, {"role": "assistant", "content": "2", "reasoning_content": "easy"}, *USER]
    assert "<think>easy</think>2" in template(CHAT_TEMPLATE).render(messages, None, {})
    assert "easy" not in template(CHAT_TEMPLATE).render(messages, None, {"clear_thinking": True})


def test_messages_are_normalised():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "1"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    source = (
        "{% for m in messages %}{{ m.role }}|{{ m.content }}|{{ m.tool_calls | default([]) | tojson }};{% endfor %}"
    )
    want = [{"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}]
    assert (
        template(source).render(messages, None, {})
        == f"system|Be brief.|[];assistant||{json.dumps(want)};tool|done|[];"
    )
    assert isinstance(call["function"]["arguments"], str), "the caller's messages are left as they were"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_billing_headers_are_dropped_from_system_prompts(role):
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;"
    for content in (
        f"{billing}\nBe brief.",
        [{"type": "text", "text": f"{billing}\n"}, {"type": "text", "text": "Be brief."}],
    ):
        messages = [{"role": role, "content": content}, {"role": "user", "content": billing}]
        rendered = template("{% for m in messages %}{{ m.content }}|{% endfor %}").render(messages, None, {})
        assert rendered == f"Be brief.|{billing}|"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', 5])
def test_arguments_must_be_an_object(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        template("x").render([{"role": "assistant", "content": "", "tool_calls": [call]}], None, {})


def test_tojson_escapes_nothing_and_indents():
    data = {"a": "<é&'>", "b": [1, None]}
    assert template("{{ x | tojson }}").render(USER, None, {"x": data}) == json.dumps(data, ensure_ascii=False)
    assert template("{{ x | tojson(indent=2) }}").render(USER, None, {"x": data}) == json.dumps(
        data, ensure_ascii=False, indent=2
    )
    assert "\\u00e9" in template("{{ x | tojson(ensure_ascii=True) }}").render(USER, None, {"x": data})


def test_loop_controls_trimming_and_the_clock():
    source = "{% for i in range(9) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n"
    assert template(source).render(USER, None, {}) == "0\n1\n"
    assert template("{{ strftime_now('%Y') }}").render(USER, None, {}).isdigit()


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{{ messages[7].content }}", "has no element 7|undefined"),
        ("{{ 'a' + 1 }}", "refuses these messages"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_template_errors_are_the_requests(source, sentence):
    with pytest.raises(RequestError, match=sentence):
        template(source).render(USER, None, {})


def test_reserved_names_cannot_be_overridden():
    assert template("{{ messages[0].content }}").render(USER, None, {"messages": []}) == "Hi"


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "B"}, "chat_template": "{{ bos_token }}1"}))
    assert ChatTemplate.from_folder(tmp_path).render(USER, None, {}) == "B1"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path).render(USER, None, {}) == "plain"
    assert ChatTemplate.from_folder(tmp_path).render(USER, [{"type": "function"}], {}) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path).render(USER, None, {}) == "file"


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        5,
        {"name": "default"},
        [],
        [{"name": "rag", "template": "x"}],
        [{"name": "default", "template": None}],
        [{"name": 5, "template": "x"}, {"name": "default", "template": "x"}],
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if x %}" * 100 + "{% endif %}" * 100,
    ],
)
def test_a_template_that_cannot_work_is_refused_at_start(tmp_path, source):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(UserError, match="tokenizer_config.json"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("token", [{"text": "x"}, {"content": 5}, ["x"], 5])
def test_special_tokens_are_texts(tmp_path, token):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token, "chat_template": "x"}))
    with pytest.raises(UserError, match='"eos_token" is neither a text nor'):
        ChatTemplate.from_folder(tmp_path)
