"""Answers put together: several for a prompt, echoed prompts, what streams say and whole answers say."""

import json

import orjson

from hetero_glm5.core import Drawn, SamplingParams, Sequence, TokenEvent
from hetero_glm5.server.collectors import TextCollector
from hetero_glm5.server.generate import GenerateCollector, GenerateRequest
from hetero_glm5.server.protocol import CompletionRequest
from hetero_glm5.server.tokenizer import Tokenizer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


def by_index(chunks: list[str], said) -> dict[int, str]:
    """The concatenated said(choice) of a stream's choices."""
    texts: dict[int, str] = {}
    for chunk in chunks[:-1]:
        for choice in json.loads(chunk)["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (said(choice) or "")
    return texts


def test_each_prompt_has_n_neighbouring_choices(serve, fake_engine):
    served = serve(fake_engine())
    body = {"prompt": [[1], [1, 2]], "n": 2, "max_tokens": 2}
    whole = served.http.post(TEXT, json=body).json()
    texts = [choice["text"] for choice in whole["choices"]]
    assert texts == [f" w{i}.0 w{i}.1" for i in (1, 1, 2, 2)]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (3, 8)
    streamed = by_index(served.chunks(TEXT, **body), lambda choice: choice["text"])
    assert streamed == dict(enumerate(texts))


def test_cached_tokens_are_those_of_each_prompts_first_answer(serve, fake_engine):
    engine = fake_engine()
    add = engine.add_all

    def add_all(tokens, params, **options):
        seqs = add(tokens, params, **options)
        for found, seq in enumerate(seqs, 1):
            seq.num_cached = found
        return seqs

    engine.add_all = add_all
    body = {"prompt": [[1], [1, 2]], "n": 3, "max_tokens": 1}
    usage = serve(engine).http.post(TEXT, json=body).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_a_chat_with_several_answers_parses_each(serve, fake_engine):
    said = ["hm</th", "ink>so<tool_call>f", "</tool_call>"]
    served = serve(fake_engine(lambda prompt: said), reasoning_parser="glm45", tool_call_parser="glm47")
    body = {**HI, "n": 2, "tools": [{"type": "function", "function": {"name": "f"}}]}
    whole = served.http.post(CHAT, json=body).json()
    for choice in whole["choices"]:
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("hm", "so")
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
    chunks = served.chunks(CHAT, **body)
    for said_of in ("reasoning_content", "content"):
        texts = by_index(chunks, lambda choice, name=said_of: choice["delta"].get(name))
        assert texts == dict.fromkeys((0, 1), {"reasoning_content": "hm", "content": "so"}[said_of])
    roles = [json.loads(chunk)["choices"][0] for chunk in chunks[:2]]
    assert [(choice["index"], choice["delta"]["role"]) for choice in roles] == [(0, "assistant"), (1, "assistant")]


def test_one_call_is_kept_if_calls_are_not_parallel(serve, fake_engine):
    call = "<tool_call>f</tool_call>"
    served = serve(fake_engine(lambda prompt: ["a", call, call, "b"]), tool_call_parser="glm47")
    body = {**HI, "tools": [{"type": "function", "function": {"name": "f"}}]}
    for parallel, calls in ((True, 2), (False, 1)):
        answer = served.http.post(CHAT, json={**body, "parallel_tool_calls": parallel}).json()
        message = answer["choices"][0]["message"]
        assert len(message["tool_calls"]) == calls and message["content"] == "ab"


def test_reasoning_may_stay_in_the_content(serve, fake_engine):
    served = serve(fake_engine(lambda prompt: ["hm</think>so"]), reasoning_parser="glm45")
    answer = served.http.post(CHAT, json={**HI, "separate_reasoning": False}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hm</think>so"}


def test_an_echoed_prompt_stands_before_the_answer(serve, fake_engine, tokenizer):
    served = serve(fake_engine())
    body = {"prompt": ["One é", "Two"], "echo": True, "max_tokens": 1}
    counts = [len(tokenizer.encode(text)) for text in ("One é", "Two")]
    texts = {0: f"One é w{counts[0]}.0", 1: f"Two w{counts[1]}.0"}
    assert by_index(served.chunks(TEXT, **body), lambda choice: choice["text"]) == texts
    silent = served.http.post(TEXT, json={**body, "max_tokens": 0}).json()
    assert [choice["text"] for choice in silent["choices"]] == ["One é", "Two"]
    assert silent["usage"]["completion_tokens"] == 0 and silent["choices"][0]["finish_reason"] == "length"
    assert by_index(served.chunks(TEXT, **{**body, "max_tokens": 0}), lambda c: c["text"]) == {0: "One é", 1: "Two"}


class Counted(Tokenizer):
    """Counts the tokens that are spelt."""

    def __init__(self, tokenizer: Tokenizer):
        vars(self).update(vars(tokenizer))
        self.spelt = 0

    def token_bytes(self, token: int) -> bytes:
        self.spelt += 1
        return super().token_bytes(token)


PROMPT = list(range(40, 140))
KNOWN = [Drawn(token, -1.5, ((token, -1.5),)) for token in PROMPT[1:]]


def told(collector, answers: int, *, read: bool) -> list[list[dict]]:
    """What streams of two tokens each say; `read`: someone asks for it."""
    events = []
    for index in range(answers):
        seq = Sequence([*PROMPT, 7, 7], SamplingParams(), len(PROMPT))
        seq.prompt_logprobs = list(KNOWN)
        drawn = Drawn(7, -2.0, ((7, -2.0),))
        for token in (TokenEvent(seq, 7, "x", None, drawn=drawn), TokenEvent(seq, 7, "x", "length", drawn=drawn)):
            chunks = collector.tell(index, token)
            events.append(orjson.loads(orjson.dumps(list(chunks))) if read else [])
    return events


def test_a_prompts_log_probabilities_are_spelt_once_for_all_answers(tokenizer):
    asked = CompletionRequest(prompt="", echo=True, logprobs=1, n=9)
    params, counted = SamplingParams(n=9, logprobs=1, prompt_logprobs=1), Counted(tokenizer)
    collector = TextCollector(asked, [PROMPT], params, counted)
    streamed = [chunk["logprobs"] for (chunk,) in told(collector, 9, read=True)]
    whole = [choice["logprobs"] for choice in orjson.loads(orjson.dumps(collector.choices()))]
    assert counted.spelt < 6 * len(PROMPT)
    for i, one in enumerate(whole):
        assert one == whole[0] and len(one["tokens"]) == len(PROMPT) + 2
        first, second = streamed[2 * i : 2 * i + 2]
        assert one == {name: first[name] + second[name] for name in first}


def test_native_answers_are_spelt_when_they_are_asked_for(tokenizer):
    body = {"input_ids": PROMPT, "return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
    asked, counted = GenerateRequest(**body, top_logprobs_num=1, sampling_params={"n": 9}), Counted(tokenizer)
    collector = GenerateCollector(asked, [PROMPT], counted, "r")
    told(collector, 9, read=False)
    assert counted.spelt == 0
    whole = orjson.loads(orjson.dumps(collector.choices()))
    streamed = told(GenerateCollector(asked, [PROMPT], counted, "r"), 9, read=True)
    assert counted.spelt < 6 * len(PROMPT)
    scores = [chunk["meta_info"]["input_token_logprobs"] for chunk in [*whole, *(event[0] for event in streamed)]]
    assert len(scores) == 27 and all(one == scores[0] for one in scores)
    assert scores[0][0] == [None, 40, tokenizer.decode([40])] and scores[0][1][:2] == [-1.5, 41]
