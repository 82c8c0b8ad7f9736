"""Streams while nothing is computed: every API says that it is alive, well before its clients give up."""

import threading
import time

import httpx
import pytest
from scripted import pieces

from hetero_glm5.server import streaming

PATIENCE = 20  # seconds of silence after which some clients give up
HI = [{"role": "user", "content": "Hi"}]
ROUTES = {
    "/v1/chat/completions": ({"messages": HI}, ": ping"),
    "/v1/completions": ({"prompt": "Hi"}, ": ping"),
    "/generate": ({"text": "Hi"}, ": ping"),
    "/v1/responses": ({"input": "Hi"}, ": ping"),
    "/v1/messages": ({"messages": HI, "max_tokens": 9}, "event: ping"),
}


def listen(url: str, route: str) -> list[tuple[float, str]]:
    """The lines of a stream, and when they came; the request is the first."""
    heard = [(time.monotonic(), "")]
    body = {**ROUTES[route][0], "stream": True}
    with httpx.stream("POST", url + route, json=body, timeout=PATIENCE) as answer:
        assert answer.status_code == 200
        heard += [(time.monotonic(), line) for line in answer.iter_lines() if line]
    return heard


def stall(serve, fake_engine, seconds: float) -> dict[str, list[tuple[float, str]]]:
    """What each route's client hears of an engine that makes its first step after so long."""
    engine, hold = fake_engine(pieces("done")), threading.Event()
    engine.before_step = lambda: hold.wait(2 * seconds)
    served, heard = serve(engine), {}
    clients = [
        threading.Thread(target=lambda route=route: heard.update({route: listen(served.url, route)}))
        for route in ROUTES
    ]
    for client in clients:
        client.start()
    time.sleep(seconds)
    hold.set()
    for client in clients:
        client.join(PATIENCE)
    assert heard.keys() == ROUTES.keys()
    return heard


def pings(heard: dict[str, list[tuple[float, str]]]) -> list[int]:
    return [[line for _, line in lines].count(ROUTES[route][1]) for route, lines in heard.items()]


def test_every_api_pings(serve, fake_engine, monkeypatch):
    monkeypatch.setattr(streaming, "SILENCE", 0.1)
    heard = stall(serve, fake_engine, 1.0)
    assert min(pings(heard)) >= 2, "and, on a machine that is not busy, about nine"
    assert all(any("don" in line for _, line in lines) for lines in heard.values()), "then they answer"
    events = [line for _, line in heard["/v1/messages"]]
    assert events[events.index("event: ping") + 1] == 'data: {"type":"ping"}'
    assert events[1] == "event: message_start" and events[-1] == 'data: {"type":"message_stop"}'


@pytest.mark.slow
def test_no_client_gives_up_during_a_minute_of_prefill(serve, fake_engine):
    heard = stall(serve, fake_engine, 60)
    assert min(pings(heard)) >= 4
    for lines in heard.values():
        times = [at for at, _ in lines]
        assert max(b - a for a, b in zip(times, times[1:], strict=False)) < PATIENCE
