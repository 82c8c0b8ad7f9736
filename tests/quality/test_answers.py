"""Marking made-up outputs: right, wrong and malformed."""

import pytest

from hetero_glm5.demo.corpus import Task, render, tasks
from hetero_glm5.llm import Output
from hetero_glm5.quality.answers import Answer, Marks, mark, same, says

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
PARIS = [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]


def answer(text: str, expected, kind: str = "tools", reason: str = "stop") -> Answer:
    thinking = "</think>" in text
    tools = TOOLS if kind == "tools" else None
    task = Task(kind, [], tools, thinking, expected)
    return Answer.of(task, Output([1], [2], text, reason))


def call(name: str, **arguments: object) -> str:
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items())
    return f"<tool_call>{name}{pairs}</tool_call>"


@pytest.mark.parametrize(
    ("text", "well_formed", "right"),
    [
        (call("get_weather", city="Paris", days=3), True, True),
        (call("get_weather", days=3, city="Paris"), True, True),
        (f"I look.</think>{call('get_weather', city='Paris', days=3)}", True, True),
        (f"One moment.{call('get_weather', city='Paris', days=3)}", True, True),
        (call("get_weather", city="Rome", days=3), True, False),
        (call("get_weather", city="Paris"), True, False),
        (call("get_weather", city="Paris", days="three"), True, False),  # a string where a number was meant
        (call("get_time"), True, False),
        (call("get_weather", city="Paris", days=3) * 2, True, False),
        (call("get_weather", days=3), False, False),  # a required argument is missing
        (call("get_weather", city="Paris", days=3, hour=1), False, False),  # an unknown argument
        (call("get_wether", city="Paris", days=3), False, False),  # no such tool
        (call("get_weather", city="Paris", days=3) + call("get_wether"), False, False),
        (call("get_weather", city="Paris", days=3).removesuffix("</tool_call>"), False, False),
        (call("get_weather", city="Paris", days=3) + "<tool_call>", False, False),
        (call("get_weather", city="Paris", days=3).replace("</arg_value>", "", 1), False, False),
        ("It is sunny in Paris.", False, False),
        ("", False, False),
    ],
)
def test_calls(text, well_formed, right):
    given = answer(text, PARIS)
    assert (given.well_formed, given.right) == (well_formed, right)


def test_a_call_that_the_limit_cut_is_not_well_formed():
    given = answer(call("get_weather", city="Paris", days=3), PARIS, reason="length")
    assert not given.well_formed and not given.right


def test_several_calls_count_in_order():
    two = [*PARIS, {"name": "get_time", "arguments": {}}]
    weather, time = call("get_weather", city="Paris", days=3), call("get_time")
    assert answer(weather + time, two).right and not answer(time + weather, two).right
    assert not answer(weather, two).right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("27 + 45 = 72.", True),
        ("27 + 45: 7+5=12.</think>27 + 45 = 72.", True),
        ("72</think>27 + 45 = 71.", False),  # only the content counts
        ("72 is 27 + 45", False),  # the last number is the answer
        ("27 + 45 = 172.", False),
        ("27 + 45 = -72.", False),
        ("27 + 45 = 72.5.", False),
        ("", False),
    ],
)
def test_sums(text, right):
    assert answer(text, "72", "sums").right == right


def test_other_questions_are_answered_in_words():
    assert answer("The port is 30000.", "30000", "project").right
    assert not answer("The port is 30000.", "30000", "project", reason="length").right
    assert not answer(call("get_time"), "sunny", "tools").right  # a call where words were due
    assert answer("It is sunny in Paris.", "sunny", "tools").right


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        ("It is 21 degrees.", "21", True),
        ("It is 21.5 degrees.", "21", False),
        ("It is -21 degrees.", "21", False),
        ("It is 121 degrees.", "21", False),
        ("Room 21, please.", "21", True),
        ("In the kitchenette.", "in the kitchen", False),
        ("Use --kt-cpuinfer.", "--kt-cpuinfer", True),
        ("Spell it C-A-T.", "C-A-T.", True),
        ("It is the key.", "key", True),
        ("It is the monkey.", "key", False),
    ],
)
def test_words_are_found_whole(content, expected, found):
    assert says(content, expected) == found


def test_json_values_are_equal_by_type():
    assert same({"a": [1, 2.0, None]}, {"a": [1.0, 2, None]}) and same(True, True)
    assert not same(1, True) and not same([1], [1, 2]) and not same({"a": 1}, {"b": 1}) and not same(1, "1")


def test_marks_count():
    good, bad = answer(call("get_weather", city="Paris", days=3), PARIS), answer("no", PARIS)
    assert mark([good, bad, good]) == Marks(3, 2, 2)
    assert mark([answer("72", "72", "sums")]) == Marks(1, 1, None)


@pytest.mark.parametrize("kind", ["sums", "project", "chats", "tools"])
def test_a_perfect_answer_to_any_task_is_right_and_anothers_is_not(kind):
    """What the chat template makes of the expected calls is what the parser must take apart again."""
    asked = tasks(kind, 100, 0)
    texts = [perfect(task) for task in asked]
    outputs = [Output([1], [2], text, "stop") for text in texts]
    assert all(Answer.of(task, output).right for task, output in zip(asked, outputs, strict=True))
    shifted = mark([Answer.of(task, output) for task, output in zip(asked, outputs[1:] + outputs[:1], strict=True)])
    assert shifted.right < 25  # chats ask the same now and then


def perfect(task: Task) -> str:
    lead = "I think.</think>" if task.thinking else ""
    if isinstance(task.expected, str):
        return f"{lead}{task.expected}"
    calls = [{"type": "function", "function": call} for call in task.expected]
    before = render(task.messages, task.tools, thinking=False)
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    return lead + render([*task.messages, turn], task.tools, generation_prompt=False).removeprefix(before)
