"""All that `hetero-glm5 bench quality` measures, as one JSON object.

    format      1, the version of this description
    model, seed, count, cpu, isa, threads, seconds
    perplexity  method: {kind and "all": {perplexity, tokens}, "ratio": all's to BF16's}, over the tokens of held-out
                documents that the model is to write. FP32 computes everything in fp32; in the other methods attention
                and dense layers are bf16 and the routed experts in that format
    deferral    count: {perplexity, tokens, ratio}, BF16 with that many experts of a token added one MoE layer later
    sparse      {index_topk, length, own, all: {sparse, dense, ratio, tokens}}: perplexities in BF16 at the positions
                from index_topk on of recall documents of about `length`, 4 x index_topk, tokens; over the tokens that
                the model is to write, and over all
    answers     method: {task: {asked, right, well_formed}}: greedy; well_formed (of calls) else null
    drafting    kind and "all": {places, accepted, shares, tokens_per_step}, each by depth from 1: see drafting.py
    routing     {experts, layers, selections, entropy, shares}: see routing.py; shares by the share of experts
    left_out    a sentence for each part that this model cannot be measured in; the part is null or missing

What cannot be computed, such as a perplexity over no tokens, is null.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hetero_glm5.demo.corpus import KINDS, tasks
from hetero_glm5.hardware import cpu_name
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.quality.answers import Answer, ask, mark
from hetero_glm5.quality.deferral import deferring
from hetero_glm5.quality.drafting import Drafter, count_accepted
from hetero_glm5.quality.perplexity import Loss, losses, losses_by_kind, total
from hetero_glm5.quality.routing import SHARES, describe, recording
from hetero_glm5.quality.texts import Text, held_out, long
from hetero_glm5.quality.variants import dense_attention, fp8_experts
from hetero_glm5.server.tokenizer import Tokenizer

FORMAT = 1
BASELINE = "BF16"
ASKED_KINDS = ("sums", "project", "chats", "tools")
RECALL_TOKENS = (1024, 2048, 4096)
TOKENS_FOR_EACH = 100  # of a kind's documents, for each question of --count
MOST_DEFERRED = 4

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    methods: tuple[str, ...]
    count: int  # questions of each kind
    seed: int
    quick: bool  # recall and long texts at their smallest; questions in BF16 only

    @property
    def recall_tokens(self) -> tuple[int, ...]:
        return RECALL_TOKENS[:1] if self.quick else RECALL_TOKENS

    @property
    def long_texts(self) -> int:
        return 2 if self.quick else 16


def measure(folder: str, options: Options, tell: Tell) -> dict[str, Any]:
    """The whole report on the checkpoint in `folder`. `tell` hears what is being done. Raises UserError."""
    started = time.monotonic()
    with TemporaryDirectory(prefix="hetero-glm5-") as scratch:
        report = _Measuring(folder, options, tell, Path(scratch)).run()
    return report | {"seconds": round(time.monotonic() - started, 1)}


class _Measuring:
    def __init__(self, folder: str, options: Options, tell: Tell, scratch: Path):
        self.folder, self.options, self.tell, self.scratch = folder, options, tell, scratch
        self.config, self.tokenizer = ModelConfig.load(folder), Tokenizer.from_folder(folder)
        self.fp8 = fp8_experts(folder, self._new_folder("fp8")) if "FP8" in options.methods else None
        self.losses: dict[str, dict[str, Loss]] = {}  # by method and kind
        self.texts: list[Text] = []
        self.answers: dict[str, list[Answer]] = {}  # by method
        self.left_out: list[str] = []

    def run(self) -> dict[str, Any]:
        with self._llm(BASELINE) as llm:
            pool = llm.engine.pool
            report = {"format": FORMAT, "cpu": cpu_name(), "isa": pool.isa, "threads": pool.threads}
            report |= {"seed": self.options.seed, "count": self.options.count}
            report["routing"] = self._baseline(llm)
            report["deferral"] = self._deferral(llm)
            marks = {BASELINE: self._ask(llm, BASELINE)}
            report["sparse"] = self._sparse(llm)
        report["drafting"] = self._drafting()
        for method in self.options.methods:
            if method != BASELINE:
                with self._llm(method) as llm:
                    self.tell(f"perplexity, {method}")
                    self.losses[method] = losses_by_kind(llm, self.texts)
                    if not self.options.quick:
                        marks[method] = self._ask(llm, method)
        methods = dict.fromkeys((*self.options.methods, BASELINE))
        report["perplexity"] = {m: _by_kind(self.losses[m]) | {"ratio": self._ratio(self.losses[m])} for m in methods}
        report["answers"] = {method: marks[method] for method in methods if method in marks}
        return report | {"left_out": self.left_out}

    def _llm(self, method: str, folder: str = "") -> LLM:
        dtype = "float32" if method == "FP32" else "bfloat16"
        experts = self.fp8 if method == "FP8" else None
        return LLM(folder or self.folder, device="cpu", dtype=dtype, kt_method=method, kt_weight_path=experts)

    def _new_folder(self, name: str) -> Path:
        (self.scratch / name).mkdir()
        return self.scratch / name

    def _baseline(self, llm: LLM) -> dict[str, Any]:
        """Draws the texts and takes their losses; returns how their tokens were routed."""
        self.tell("held-out documents")
        seed, budget, longest = self.options.seed, self.options.count * TOKENS_FOR_EACH, llm.engine.context_length - 1
        self.texts = [text for kind in KINDS for text in held_out(self.tokenizer, kind, seed, budget, longest)]
        self.tell(f"perplexity, {BASELINE}")
        with recording(llm) as recorder:
            self.losses[BASELINE] = losses_by_kind(llm, self.texts)
        routing = describe(recorder.take(), self.config.n_routed_experts)
        shares = {f"{share:g}": layers for share, layers in zip(SHARES, routing.shares, strict=True)}
        return asdict(routing) | {"shares": shares, "layers": self.config.moe_layers}

    def _deferral(self, llm: LLM) -> dict[str, Any]:
        rows = {}
        for count in range(1, min(MOST_DEFERRED, self.config.num_experts_per_tok) + 1):
            self.tell(f"perplexity, {count} experts deferred")
            with deferring(llm, count):
                found = losses_by_kind(llm, self.texts)
            rows[f"{count}"] = _shown(total(found.values())) | {"ratio": self._ratio(found)}
        return rows

    def _ask(self, llm: LLM, method: str) -> dict[str, Any]:
        count, seed = self.options.count, self.options.seed
        questions = {kind: tasks(kind, count, seed) for kind in ASKED_KINDS}
        for tokens in self.options.recall_tokens:
            questions[f"recall {tokens}"] = tasks("recall", max(1, count // 4), seed, tokens)
        answered: dict[str, list[Answer]] = {}
        for name, asked in questions.items():
            self.tell(f"questions, {method}: {name}")
            answers = ask(llm, self.tokenizer, asked)
            if not answers and method == BASELINE:
                self.left_out.append(f"{name}: the context of {llm.engine.context_length} tokens is too short for it.")
            self.answers.setdefault(method, []).extend(answers)
            for answer in answers:
                part = name if name != "tools" else "tools: calls" if answer.calling else "tools: results"
                answered.setdefault(part, []).append(answer)
        return {part: asdict(mark(answers)) for part, answers in answered.items()}

    def _sparse(self, llm: LLM) -> dict[str, Any] | None:
        topk = self.config.index_topk
        length = 4 * topk
        if length + topk >= llm.engine.context_length:
            self.left_out.append(
                f"sparse: the context of {llm.engine.context_length} is too short for {length} tokens."
            )
            return None
        texts = long(self.tokenizer, "recall", self.options.seed, length, self.options.long_texts)
        self.tell(f"sparse attention at {length} tokens")
        sparse = _summed(losses(llm, text, topk) for text in texts)
        self.tell(f"dense attention at {length} tokens")
        with self._llm(BASELINE, dense_attention(self.folder, self._new_folder("dense"))) as other:
            dense = _summed(losses(other, text, topk) for text in texts)
        figures: dict[str, Any] = {"index_topk": topk, "length": length}
        for part, s, d in zip(("own", "all"), sparse, dense, strict=True):
            ratio = s.perplexity / d.perplexity
            figures[part] = {"sparse": s.perplexity, "dense": d.perplexity, "ratio": ratio, "tokens": s.tokens}
        return figures

    def _drafting(self) -> dict[str, Any] | None:
        if not self.config.num_nextn_predict_layers:
            self.left_out.append("drafting: this checkpoint has no MTP layer.")
            return None
        runs: dict[str, list[list[int]]] = {}
        with Drafter(self.folder) as drafter:
            for kind in ASKED_KINDS:
                self.tell(f"drafting: {kind}")
                spoken = [(a.prompt + a.output, len(a.prompt)) for a in self.answers[BASELINE] if a.task.kind == kind]
                runs[kind] = drafter.runs(spoken)
        runs["all"] = [run for of_kind in runs.values() for run in of_kind]
        found = {kind: count_accepted(of_kind) for kind, of_kind in runs.items()}
        return {kind: asdict(accepted) | {"shares": accepted.shares} for kind, accepted in found.items()}

    def _ratio(self, found: dict[str, Loss]) -> float:
        """Of the perplexity over all kinds to the baseline's."""
        return total(found.values()).perplexity / total(self.losses[BASELINE].values()).perplexity


def _summed(pairs: Iterable[tuple[Loss, Loss]]) -> tuple[Loss, Loss]:
    own, whole = zip(*pairs, strict=True)
    return total(own), total(whole)


def _by_kind(found: dict[str, Loss]) -> dict[str, Any]:
    return {kind: _shown(loss) for kind, loss in (found | {"all": total(found.values())}).items()}


def _shown(loss: Loss) -> dict[str, Any]:
    return {"perplexity": loss.perplexity, "tokens": loss.tokens}
