"""`hetero-glm5 chat`: a conversation in the terminal, with a running server or with a model of its own."""

from __future__ import annotations

import logging
import readline
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from hetero_glm5.cli.chat_client import Answer, Client, embedded
from hetero_glm5.core import UserError
from hetero_glm5.server.progress import LoadDisplay

URL = "http://127.0.0.1:30000"
STYLES = {"reasoning": "dim", "content": "", "call": "cyan"}
HELP = "/clear, /system TEXT, /think on|off, /quit; Ctrl-C stops an answer, and at an empty prompt the chat."


def chat(
    url: Annotated[str, typer.Option(help="of the server to talk to")] = URL,
    model: Annotated[str, typer.Option(help="load this folder, or demo, instead of talking to a server")] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="what the model is told about itself")] = "",
    tools: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON list of tools that it may call")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="of the server")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="of an answer; 0 = up to the context length")] = 0,
) -> None:
    """Chat in the terminal: thinking is dim, tool calls are shown, and after each answer how fast it was.

    Commands: /clear, /system TEXT, /think on|off, /quit. If stdin is no terminal, all of it is one prompt, and the
    answer's content is all that is printed to stdout.
    """
    settings: dict[str, Any] = {"max_tokens": max_tokens} if max_tokens else {}
    if tools is not None:
        settings["tools"] = _tools(tools)
    with ExitStack() as stack:
        if model:
            display = LoadDisplay(Console(stderr=True))
            logging.getLogger("uvicorn").setLevel(logging.ERROR)
            try:
                url = stack.enter_context(embedded(model, display.update))
            finally:
                display.close()
        client = Client(url, api_key)
        talk = Talk(client, settings | {"model": client.model()}, system)
        if not sys.stdin.isatty():
            talk.answer_once(sys.stdin.read())
            return
        talk.note(f"{talk.settings['model']} at {url}. {HELP}")
        talk.run(_ask)


def _tools(path: Path) -> list[Any]:
    try:
        tools = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--tools {path} is no JSON: {error}.") from error
    if not isinstance(tools, list):
        raise UserError(f"--tools {path} holds no list; it must list tools as chat completions take them.")
    return tools


def _ask(prompt: str) -> str:
    """A line from the terminal. Ctrl-C in a line that is not empty begins another one."""
    typed = ""

    def interrupted(*_: Any) -> None:
        nonlocal typed
        typed = readline.get_line_buffer()  # empty again by the time that input() has ended
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        while True:
            try:
                return input(prompt)
            except KeyboardInterrupt:
                if not typed:
                    raise
                print()
    finally:
        signal.signal(signal.SIGINT, before)


class Talk:
    """A conversation. `settings`: what every request says beside the messages."""

    def __init__(self, client: Client, settings: dict[str, Any], system: str = "", console: Console | None = None):
        self.client, self.settings, self.system = client, settings, system
        self.console = console or Console()
        self.thinking: bool | None = None  # as the model's template has it
        self.messages: list[dict[str, Any]] = []

    def run(self, ask: Callable[[str], str]) -> None:
        """Until /quit, the end of the input, or Ctrl-C at a prompt."""
        try:
            while True:
                line = ask("> ").strip()
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.say({"role": "user", "content": line}, ask)
        except (EOFError, KeyboardInterrupt):
            self.console.print()

    def command(self, line: str) -> bool:
        """Obeys a line with a slash; False: the chat is over."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/clear":
            self.messages = []
        elif name == "/system":
            self.system, self.messages = rest, []
        elif name == "/think" and rest in ("on", "off"):
            self.thinking = rest == "on"
        else:
            self.note(f"{line!r} is no command. {HELP}", "yellow")
            return True
        self.note("noted" if name == "/think" else "a new conversation")
        return True

    def say(self, message: dict[str, Any], ask: Callable[[str], str]) -> None:
        """One turn, and, while the model calls tools, what they gave, which the user types in. A turn that fails or is
        cancelled before there is any content is forgotten."""
        before = len(self.messages)
        self.messages.append(message)
        while True:
            answer = Answer()
            try:
                self._stream(answer, self._show)
            except UserError as error:
                self.note(f"\nerror: {error}", "red")
                del self.messages[before:]
                return
            except KeyboardInterrupt:
                self.note("\n(cancelled)")
                answer.calls = []
            if not (answer.content or answer.calls):
                del self.messages[before:]
                return
            self.messages.append(answer.message())
            self.note(f"\n{answer.summary}")
            if not answer.calls:
                return
            for call in answer.calls:
                result = ask(f"result of {call['function']['name']}> ")
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def answer_once(self, prompt: str) -> None:
        """Content to the console, all else to stderr."""
        if not prompt.strip():
            raise UserError("stdin is empty; it must hold the prompt.")
        self.messages.append({"role": "user", "content": prompt.removesuffix("\n")})
        answer = Answer()
        self._stream(answer, lambda kind, text, _: self.console.file.write(text) if kind == "content" else None)
        self.console.file.write("\n" * (not answer.content.endswith("\n")))
        for call in answer.calls:
            self.console.file.write(f"{call['function']['name']} {call['function']['arguments']}\n")
        Console(stderr=True).print(answer.summary, style="dim", highlight=False)

    def _stream(self, answer: Answer, show: Callable[[str, str, str], Any]) -> None:
        """Calls show(kind, text, kind of the piece before) for each piece."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = self.settings | {"messages": system + self.messages}
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        before = ""
        with closing(self.client.chunks(body)) as chunks:
            for chunk in chunks:
                for kind, text in answer.take(chunk):
                    show(kind, text, before)
                    before = kind

    def _show(self, kind: str, text: str, before: str) -> None:
        if before and kind != before:
            self.console.print()
        self.note(text, STYLES[kind], end="")

    def note(self, text: str, style: str = "dim", end: str = "\n") -> None:
        """Prints the text as it is."""
        self.console.print(text, end=end, style=style, markup=False, highlight=False, soft_wrap=True)
