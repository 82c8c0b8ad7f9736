import json
import socket
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hetero_glm5.cli.chat_client import Answer, Client, embedded
from hetero_glm5.core import UserError


class Scripted(ThreadingHTTPServer):
    """Answers a chat completion with `lines`, or `refusal` (status, body); `asked`: (body, headers) of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines, self.refusal, self.asked, self.gone = [], None, [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "scripted"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, dict(self.headers)))
        status, text = self.server.refusal or (200, "")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())
        try:
            for line in self.server.lines:
                self.wfile.write(f"{line}\n\n".encode())
                self.wfile.flush()
        except OSError:
            self.server.gone.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def scripted():
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def delta(**said):
    return "data: " + json.dumps({"choices": [{"delta": said, "finish_reason": None}]})


def call(index, text, name=None):
    head = {"id": f"id{index}"} if name else {}
    function = {"name": name, "arguments": text} if name else {"arguments": text}
    return delta(tool_calls=[{"index": index, **head, "function": function}])


END = "data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]})
USAGE = "data: " + json.dumps({
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
})  # fmt: skip
SAID = [delta(role="assistant"), ": ping", delta(reasoning_content="hm"), delta(content="Hé"), delta(content="llo")]
WHOLE = [*SAID, END, USAGE, "data: [DONE]"]


def test_an_answer_piece_by_piece(scripted):
    scripted.lines = WHOLE
    client, answer = Client(f"{scripted.url}/v1/", "key"), Answer()
    assert client.model() == "scripted"
    pieces = [piece for chunk in client.chunks({"messages": []}) for piece in answer.take(chunk)]
    assert pieces == [("reasoning", "hm"), ("content", "Hé"), ("content", "llo")]
    assert answer.message() == {"role": "assistant", "content": "Héllo", "reasoning_content": "hm"}
    assert answer.finish_reason == "stop" and answer.summary.startswith("9 tokens of prompt, 4 known; 3 tokens, the fi")
    body, headers = scripted.asked[0]
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert headers["Authorization"] == "Bearer key"


def test_calls_are_put_together(scripted):
    scripted.lines = [call(0, "", "f"), call(0, '{"a"'), call(0, ": 1}"), call(1, "{}", "g"), END]
    answer = Answer()
    shown = [text for c in Client(scripted.url).chunks({}) for _, text in answer.take(c)]
    assert "".join(shown) == 'f {"a": 1}\ng {}'
    called = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in answer.message()["tool_calls"]]
    assert called == [("id0", "f", '{"a": 1}'), ("id1", "g", "{}")] and answer.summary.startswith("the first after 0.")


def test_closing_ends_the_request(scripted):
    scripted.lines = [delta(content="x" * 1000)] * 100_000
    with closing(Client(scripted.url).chunks({})) as chunks:
        next(chunks)
    assert scripted.gone.wait(10)


@pytest.mark.parametrize(
    ("refusal", "lines", "words"),
    [
        ((400, '{"error": {"message": "no such model."}}'), [], "no such model."),
        ((503, "<html>"), [], "the server answered 503 Service Unavailable."),
        (None, [delta(content="a"), 'data: {"error": {"message": "it broke."}}'], "it broke."),
    ],
)
def test_refusals_are_the_servers_own_words(scripted, refusal, lines, words):
    scripted.refusal, scripted.lines = refusal, lines
    with pytest.raises(UserError, match=words):
        list(Client(scripted.url).chunks({}))


def test_no_server_and_no_url():
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(UserError, match="does not answer.*--model demo"):
        Client(f"127.0.0.1:{port}").model()
    with pytest.raises(UserError, match="it must be like http"):
        Client("ftp://host")


def test_the_demo_model_in_this_process():
    told = []
    with embedded("demo", told.append) as url:
        client, answer = Client(url), Answer()
        assert client.model() == "demo"
        body = {"model": "demo", "messages": [{"role": "user", "content": "What is 27 + 45?"}], "temperature": 0}
        for chunk in client.chunks(body | {"max_tokens": 40}):
            answer.take(chunk)
    assert answer.reasoning or answer.content
    assert answer.usage["completion_tokens"] > 1 and "tokens/s" in answer.summary and told
    with pytest.raises(UserError, match="does not answer"):
        client.model()


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"), embedded(str(tmp_path), lambda progress: None):
        pass
