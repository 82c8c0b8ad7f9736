"""Many clients of one server process at once, and clients that leave: tokens come once each, nothing stays behind."""

import asyncio
import json
import time
from collections import Counter
from http.client import HTTPConnection
from random import Random

import httpx
import pytest
from oracle import LATENT_EPS
from processes import IN_FP32, Process
from tiny import tiny_checkpoint

COMPLETIONS = "/v1/completions"
AT_ONCE = 40  # clients that may leave together


@pytest.fixture(scope="module")
def url(checkpoints):
    flags = "--max-running-requests 32 --max-queued-requests 1000 --max-total-tokens 8192 --chunked-prefill-size 32"
    flags += f" --latent-norm-eps {LATENT_EPS}"
    server = Process("--model", tiny_checkpoint(checkpoints), *flags.split(), *IN_FP32.split())
    yield server.url
    server.kill()


def requests(count: int) -> list[dict]:
    draw = Random(count)
    return [
        {
            "prompt": [draw.randrange(300) for _ in range(draw.randrange(1, 60))],
            "max_tokens": draw.randrange(4, 25),
            "temperature": 1.0,
            "seed": seed,
            "logprobs": 0,
            "stream_options": {"include_usage": True},
        }
        for seed in range(count)
    ]


async def streamed(http: httpx.AsyncClient, body: dict) -> tuple[list[str], str, int]:
    """Tokens, text and how many tokens the usage counts."""
    tokens, text, usage = [], "", None
    async with http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for chunk in map(json.loads, lines):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            tokens += choice["logprobs"]["tokens"]
            text += choice["text"]
    return tokens, text, usage["completion_tokens"]


async def whole(http: httpx.AsyncClient, body: dict) -> tuple[list[str], str, int]:
    answer = (await http.post(COMPLETIONS, json={**body, "stream_options": None})).json()
    (choice,) = answer["choices"]
    return choice["logprobs"]["tokens"], choice["text"], answer["usage"]["completion_tokens"]


async def told_twice(url: str, count: int) -> None:
    """Asks `count` streams at once, and the same requests whole."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        asked = requests(count)
        streams = await asyncio.gather(*(streamed(http, body) for body in asked))
        wholes = await asyncio.gather(*(whole(http, body) for body in asked))
    assert streams == wholes
    assert all(
        1 <= len(tokens) == number <= body["max_tokens"]
        for (tokens, _, number), body in zip(streams, asked, strict=True)
    )
    assert len({tuple(tokens) for tokens, _, _ in streams}) > count / 2, "they differ"


def long_request(draw: Random) -> tuple[str, dict]:
    """A route and a request that takes longer than its client stays."""
    prompt = "".join(draw.choices("abcdef ", k=draw.randrange(1, 900)))
    messages, streams = [{"role": "user", "content": prompt}], draw.random() < 0.7
    return draw.choice(
        [
            (COMPLETIONS, {"prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "n": 2, "stream": streams}),
            ("/v1/chat/completions", {"messages": messages, "ignore_eos": True, "stream": streams}),
            ("/v1/messages", {"messages": messages, "max_tokens": 2000, "stream": streams}),
            ("/v1/responses", {"input": prompt, "stream": streams}),
            ("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 2000}, "stream": streams}),
        ]
    )


async def leave(url: str, seed: int, seats: asyncio.Semaphore) -> str:
    """Sends a request, or part of one, reads a little or nothing, and is gone. How far it came."""
    draw = Random(seed)
    route, body = long_request(draw)
    data = json.dumps(body).encode()
    data = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    sent = draw.randrange(len(data)) if draw.random() < 0.1 else len(data)
    host, port = url.removeprefix("http://").split(":")
    reads = body["stream"] and sent == len(data) and draw.random() < 0.6
    async with seats:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data[:sent])
        if reads:
            enough, received = draw.randrange(1, 2000), b""
            while len(received) < enough and not received.endswith(b"0\r\n\r\n"):  # or the end
                received += await reader.read(1000)
        else:
            await asyncio.sleep(draw.choice([0, 0.01, 0.1, 0.4]))
        if draw.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    return "heard" if reads else "cut" if sent < len(data) else "asked"


async def all_leave(url: str, count: int) -> None:
    seats = asyncio.Semaphore(AT_ONCE)
    body = {**requests(3)[2], "max_tokens": 24}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        before = await whole(http, body)
        came = Counter(await asyncio.gather(*(leave(url, seed, seats) for seed in range(count))))
        assert came.total() == count and all(came[far] >= count / 50 for far in ("cut", "asked", "heard")), came
        until = time.monotonic() + 60
        while (state := await self_told(http))["num_running_reqs"] or state["num_queue_reqs"]:
            assert time.monotonic() < until, state
            await asyncio.sleep(0.05)
        assert state["num_used_pages"] == 0
        assert (await http.post("/flush_cache")).status_code == 200
        state = await self_told(http)
        assert state["num_used_pages"] == state["num_kept_pages"] == 0
        metrics = (await http.get("/metrics")).text
        aborted = next(line for line in metrics.splitlines() if "num_requests_total" in line and '"abort"' in line)
        assert float(aborted.split()[-1]) >= came["heard"], "they were not let finish"
        assert await whole(http, body) == before


async def self_told(http: httpx.AsyncClient) -> dict:
    return (await http.get("/server_info")).json()["internal_states"][0]


def test_some_streams_at_once(url):
    asyncio.run(told_twice(url, 40))


def test_some_clients_leave(url):
    asyncio.run(all_leave(url, 100))


@pytest.mark.slow
def test_two_hundred_streams_at_once(url):
    asyncio.run(told_twice(url, 200))


@pytest.mark.slow
def test_a_connection_that_has_idled_is_served(url):
    connection = HTTPConnection(url.removeprefix("http://"))
    for idle in (0, 8):
        time.sleep(idle)
        connection.request("GET", "/health")
        assert connection.getresponse().read()


@pytest.mark.slow
def test_a_thousand_clients_leave(url):
    asyncio.run(all_leave(url, 1000))
