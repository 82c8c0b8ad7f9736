"""Who may talk to the server: its own names, pages' origins, request ids."""

import pytest

from hetero_glm5.config import ServerConfig
from hetero_glm5.server.guard import allowed_hosts


@pytest.mark.parametrize(
    "host, allowed, name, status",
    [
        ("127.0.0.1", None, "localhost:30000", 200),
        ("127.0.0.1", None, "LOCALHOST", 200),
        ("127.0.0.1", None, "[::1]:5", 200),
        ("127.0.0.1", None, "evil.example", 403),
        ("127.0.0.1", None, "evil.example:80", 403),
        ("0.0.0.0", None, "box.example", 200),
        ("0.0.0.0", ("box.example:443",), "box.example", 200),
        ("0.0.0.0", ("box.example",), "localhost", 403),
        ("127.0.0.1", ("*",), "evil.example", 200),
    ],
)
def test_names_of_the_server(serve, host, allowed, name, status):
    answer = serve(host=host, allowed_hosts=allowed).http.get("/health", headers={"Host": name})
    assert answer.status_code == status
    if status == 403:
        assert (
            answer.json()["error"]["code"] == "unknown_host" and "--allowed-hosts" in answer.json()["error"]["message"]
        )


def test_its_own_address_is_one_of_its_names():
    assert "127.0.0.5" in allowed_hosts(ServerConfig(host="127.0.0.5"))
    assert allowed_hosts(ServerConfig(host="10.0.0.1")) is None


@pytest.mark.parametrize(
    "allowed, origin, ok",
    [
        (None, "http://localhost:3000", True),
        (None, "https://127.0.0.1", True),
        (None, "http://localhost.evil.example", False),
        (("https://a.example",), "https://a.example", True),
        (("https://a.example",), "http://localhost", False),
        (("*",), "https://b.example", True),
    ],
)
def test_pages_that_may_ask(serve, allowed, origin, ok):
    http = serve(allowed_origins=allowed, api_key="k").http
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    before = http.options("/v1/chat/completions", headers=ask)
    assert (before.status_code == 200) is ok, "asked without the key"
    after = http.get("/health", headers={"Origin": origin})
    assert ("access-control-allow-origin" in after.headers) is ok


def test_request_ids(serve):
    http = serve(api_key="k").http
    ids = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert http.get("/v1/models", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine", "on errors too"
    for odd in ("x" * 201, "é".encode(), ""):
        assert http.get("/health", headers={"X-Request-Id": odd}).headers["x-request-id"] != odd
    http.headers["Authorization"] = "Bearer k"
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "mine"})
    assert answer.json()["id"] == "cmpl-mine"
