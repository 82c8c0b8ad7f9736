"""An agent's session as prompts, and what an engine computes of them.

An agent's next prompt is its previous one, the tokens that were sampled, and what the chat template puts after them for
the tools' results or the user's next words: prefixes grow token for token. Some requests are cancelled, in the middle
of their prefill or of their answer, and made again at once. What must be prefilled at least is counted by a trie over
token ids that knows nothing of the engine: a token of a prompt is new if no earlier prompt or output began like the
prompt up to it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hetero_glm5.core import SamplingParams, Sequence
from hetero_glm5.demo.corpus import documents, tools
from hetero_glm5.demo.corpus.document import Message, render, system, user
from hetero_glm5.demo.corpus.words import Draw
from hetero_glm5.engine.engine import Engine
from hetero_glm5.server.tokenizer import Tokenizer

RULES = "You are an agent of a workshop. Answer in one sentence, and use a tool where one helps."
SUB_AGENTS = {"reader": "Your task is to read what the files say.", "planner": "Your task is to plan the next days."}
CANCELS = {4: "prefill", 7: "decode"}  # by the number of the round modulo 8
ANSWERED = 4  # tokens of an answer, after which it is cancelled or the process killed
AROUND = 40  # tokens of a turn beside its text


class Trie:
    """Token sequences by their beginnings."""

    def __init__(self) -> None:
        self._root: dict[int, Any] = {}

    def add(self, tokens: Iterable[int]) -> int:
        """How many of the tokens end a beginning that was not known until now."""
        node, new = self._root, 0
        for token in tokens:
            new += token not in node
            node = node.setdefault(token, {})
        return new


class Agent:
    """`ids` is its next prompt. It makes `turns` requests, one in each round from `start` on, the last one of about
    `tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, name: str, task: str, *, start: int, turns: int, tokens: int):
        self.name, self.start, self.turns = name, start, turns
        self._tokenizer, self._draw = tokenizer, Draw("held-out", "agent", name)
        self._texts = documents("stories", "held-out", len(name))
        self._offers = tools.pick(Draw("held-out", "agent", "tools"), 4, ["get_weather", "read_file"])
        self._opening = [system(f"{RULES} {task}".strip()), user(self._ask())]
        self.ids = tokenizer.encode(render(self._opening, [offer.json for offer in self._offers]))
        self._growth = max(0, tokens - len(self.ids)) / max(1, turns - 1)
        self._length = float(len(self.ids))  # that the next prompt should have

    def asks(self, number: int) -> bool:
        return self.start <= number < self.start + self.turns

    def advance(self, output: list[int]) -> None:
        """`output` answers `ids`, which becomes the prompt after that."""
        said = [*self._opening, {"role": "assistant", "content": "."}]
        calls = output[-1:] == self._tokenizer.encode("<|observation|>")
        self._length += self._growth
        text = self._text(round(self._length) - len(self.ids) - len(output) - AROUND)
        reply = self._results(text) if calls else [user(f"{self._ask()} {text}".strip())]
        added = self._tokenizer.encode(render([*said, *reply]).removeprefix(render(said, generation_prompt=False)))
        ended = output[-1] == added[0]  # an answer ends with the token that begins what follows
        self.ids = self.ids + output + added[ended:]

    def _ask(self) -> str:
        return tools.single(self._draw, self._draw.choice(self._offers))[0]

    def _results(self, text: str) -> list[Message]:
        return [{"role": "tool", "tool_call_id": "call", "content": json.dumps({"content": text or "done"})}]

    def _text(self, tokens: int) -> str:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += self._tokenizer.encode(next(self._texts).pieces[1][0].removesuffix("<|endoftext|>"))
        return self._tokenizer.decode(ids[: max(0, tokens)])


def cast(tokenizer: Tokenizer, turns: int, tokens: int) -> list[Agent]:
    """The main agent, and two of a quarter of its size that work beside it."""
    agents = [Agent(tokenizer, "main", "", start=0, turns=turns, tokens=tokens)]
    for i, (name, task) in enumerate(SUB_AGENTS.items()):
        agents.append(Agent(tokenizer, name, task, start=turns // 4 + 2 * i, turns=turns // 4, tokens=tokens // 4))
    return agents


@dataclass
class Record:
    """What has happened: the prompts in the order they were sent, the answers by agent, and the engines' counts."""

    prompts: list[list[int]] = field(default_factory=list)
    known: list[int] = field(default_factory=list)  # how many answers there were before each prompt
    answers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)  # agent, prompt, output
    cancelled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CANCELS.values(), 0))
    prefilled: int = 0
    cached: int = 0
    restored: int = 0

    def of(self, agent: Agent) -> list[list[int]]:
        return [output for name, _, output in self.answers if name == agent.name]

    @property
    def new_tokens(self) -> int:
        trie, new, answers = Trie(), 0, 0
        for prompt, known in zip(self.prompts, self.known, strict=True):
            for _, asked, output in self.answers[answers:known]:
                trie.add(asked + output)
            answers = known
            new += trie.add(prompt)
        return new

    def count(self, engine: Engine) -> None:
        """What the engine has done since its start; once, at its end."""
        counts = engine.scheduler.counts
        self.prefilled += counts.prefilled_tokens
        self.cached += counts.cached_tokens
        self.restored += counts.restored_tokens

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Record:
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**data | {"answers": [tuple(answer) for answer in data["answers"]]})


class Session:
    """Goes on from where `record` ends. Answers are greedy and have at most `answer` tokens."""

    def __init__(self, agents: list[Agent], record: Record, answer: int):
        self.agents, self.record = agents, record
        self._params = SamplingParams(answer, temperature=0.0)
        for agent in agents:
            for output in record.of(agent):
                agent.advance(output)

    def run(self, engine: Engine, rounds: Iterable[int], dies: Path | None = None) -> None:
        """With `dies`, the process kills itself in the middle of the last round, and leaves its record there."""
        numbers = list(rounds)
        for number in numbers:
            self._round(engine, number, dies if number == numbers[-1] else None)
        self.record.count(engine)

    def _round(self, engine: Engine, number: int, dies: Path | None) -> None:
        asking = [a for a in self.agents if a.asks(number) and len(self.record.of(a)) == number - a.start]
        seqs = {agent: self._send(engine, agent) for agent in asking}
        cancel = CANCELS.get(number % 8)
        lucky = set() if cancel else {*asking}  # whose requests are not cancelled, or not again
        while any(not seq.finished for seq in seqs.values()):
            if any(event.error is not None for event in engine.step()):
                raise RuntimeError("the engine failed a request")
            if dies is not None and any(seq.num_output >= ANSWERED for seq in seqs.values()):
                self.record.count(engine)
                self.record.save(dies)
                os.kill(os.getpid(), signal.SIGKILL)
            for agent, seq in [(a, s) for a, s in seqs.items() if a not in lucky and _within(s, cancel)]:
                engine.abort(seq)
                self.record.cancelled[cancel] += 1
                seqs[agent] = self._send(engine, agent)
                lucky.add(agent)
        for agent, seq in seqs.items():
            self.record.answers.append((agent.name, agent.ids, seq.output))
            agent.advance(seq.output)

    def _send(self, engine: Engine, agent: Agent) -> Sequence:
        self.record.prompts.append(agent.ids)
        self.record.known.append(len(self.record.answers))
        return engine.add(agent.ids, self._params)


def _within(seq: Sequence, part: str) -> bool:
    """Whether the engine is in the middle of it."""
    if part == "decode":
        return seq.num_output >= ANSWERED and not seq.finished
    return seq.num_output == 0 and seq.num_cached is not None and seq.num_cached < seq.num_computed
