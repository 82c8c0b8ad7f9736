from __future__ import annotations

import json
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import bench_engine
import generate_peer
import pytest
from agent_session import Agent, Record, Trie
from draft_tally import MOST, Depth, Tally
from step_parts import decode_steps
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.model_config import checkpoint_folder
from hetero_glm5.server.tokenizer import Tokenizer

SCRIPT = Path(bench_engine.__file__)


@pytest.fixture
def options(checkpoints) -> Namespace:
    model = str(tiny_checkpoint(checkpoints, vocab_size=2048))
    sizes = {"turns": 8, "tokens": 1500, "answer": 6, "rounds": 2, "prompts": 1}
    return Namespace(command="test", model=model, device="cpu", dtype="float32", threads=1, json=True, **sizes)


def test_trie_counts_beginnings():
    rng, trie, known = random.Random(0), Trie(), set()
    found = []
    for _ in range(200):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(8))]
        beginnings = {tuple(tokens[:i]) for i in range(1, len(tokens) + 1)}
        found.append(trie.add(tokens))
        assert found[-1] == len(beginnings - known)
        known |= beginnings
    assert sum(found) == len(known) > found.count(0) > 10


def test_prompts_grow_token_for_token():
    tokenizer = Tokenizer.from_folder(checkpoint_folder("demo"))
    agent = Agent(tokenizer, "main", "", start=0, turns=4, tokens=1200)
    other = Agent(tokenizer, "other", "Be brief.", start=0, turns=4, tokens=1200)
    assert Trie().add(agent.ids) > 200 and agent.ids[:200] == other.ids[:200] and agent.ids != other.ids
    ends = {"<|user|>": "<|user|>", "<|observation|>": "<|observation|><tool_response>", "": "<|user|>"}
    for end, follows in ends.items():
        before, output = agent.ids, tokenizer.encode(f"I know.</think>So it is.{end}")
        agent.advance(output)
        added = tokenizer.decode(agent.ids[len(before) + len(output) :])
        assert agent.ids[: len(before) + len(output)] == before + output
        assert (end + added).startswith(follows) and added.endswith("<|assistant|><think>")
    assert 1150 < len(agent.ids) < 1250


def test_new_tokens_of_a_record():
    record = Record()
    for known, prompt in ((0, [1, 2, 3]), (0, [1, 2, 4]), (1, [1, 2, 3, 5, 6]), (1, [1, 2, 3, 5, 6])):
        record.prompts.append(prompt)
        record.known.append(known)
    record.answers = [("main", [1, 2, 3], [5])]
    assert record.new_tokens == 3 + 1 + 1 + 0


def test_a_session_goes_on_after_a_restart_and_a_kill(options, tmp_path):
    records = {}
    for way, drafting in (("straight", False), ("restarted", False), ("killed", True)):
        folder = tmp_path / way
        folder.mkdir()
        records[way] = bench_engine.replayed(options, drafting, way, folder)
    straight = records["straight"]
    assert min(straight.cancelled.values()) > 0 and straight.restored == 0
    for way, record in records.items():
        assert record.answers == straight.answers and record.new_tokens == straight.new_tokens > 1000
        assert record.new_tokens <= record.prefilled <= 1.2 * record.new_tokens
        assert (record.restored > 0) == (way != "straight")


def test_drafting_compares_the_same_work(options, monkeypatch):
    monkeypatch.setattr(bench_engine, "KINDS", ("sums",))
    options.tokens = 6
    flags = {"max_total_tokens": 2048, "disable_radix_cache": True}
    plain = bench_engine.load(options, **flags)
    drafts = bench_engine.load(options, **flags, **bench_engine.MTP, speculative_num_steps=MOST)
    rows = bench_engine.drafted(options, plain, drafts, 2, 1.0)
    plain.close()
    drafts.close()
    assert len(rows) == 2 * (1 + len(bench_engine.FIXED) + 2)
    assert all(row["tokens/step"] >= 1 and row["tokens/s"] > 0 for row in rows)
    assert {row["to off"] for row in rows if row["depth"] == "off"} == {1.0}
    assert all(len(row["accepted"].split()) >= (row["depth"] == "1") for row in rows)


def test_a_depth_keeps_a_tally():
    depth = Depth(2, 2)
    for accepted in (0, 1, 2):
        depth.verified(2, accepted)
    assert depth.choose(5) == 2 and (depth.tally.steps, depth.tally.tokens) == (3, 6)
    doubled = depth.tally + depth.tally
    assert doubled.tried[:2] == [6, 4] and doubled.right[:2] == [4, 2] and doubled.row()["accepted"] == "0.67 0.50"
    assert Tally().row() == {"tokens/step": 1.0, "accepted": ""}


def test_peers_say_the_same(options):
    options.tokens, options.rounds = 8, 1
    engines = {"ours": bench_engine.load(options, max_total_tokens=2048)}
    prompts = [list(range(20)), list(range(50, 70))]
    peer = generate_peer.fastest(options.model, "float32", "cpu", prompts, 4)
    rows = bench_engine.beside(engines, peer, prompts, options)
    engines["ours"].close()
    assert [row["who"] for row in rows] == [peer.name, "ours"] and peer.dtype == "float32"
    assert all(row["same answers"] == 2 and row["tokens/s"] > 0 for row in rows)


@pytest.mark.parametrize("drafting", [False, True])
def test_parts_of_a_step(options, drafting):
    engine = bench_engine.load(options, max_total_tokens=2048, **(bench_engine.MTP if drafting else {}))
    before = {name: getattr(engine, name) for name in ("scheduler", "runner", "sampler", "tiers", "drafter")}
    params = SamplingParams(None, 0.0, ignore_eos=True)
    for parts in (False, True):
        steps = decode_steps(engine, params, 2, 3, parts=parts)
        named = {"schedule", "recording", "runner", "tensors", "sampling", "commit"} | (
            {"drafting"} if drafting else set()
        )
        assert len(steps) == 3
        assert all({*step} == {"rest", "model", *(named if parts else ())} for step in steps)
        assert all(min(step.values()) > 0 for step in steps)
    assert before == {name: getattr(engine, name) for name in before}
    assert not engine.busy and engine.scheduler.cache.num_available == engine.scheduler.cache.pool.num_pages
    engine.close()


def test_memory_loses_no_page(options, capsys):
    options.requests = 60
    bench_engine.memory(options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["requests"] for row in rows] == [6, 60] and rows[1]["cancelled"] > 0 and rows[1]["lost"] == 0
    assert all(row["kept pages"] + row["free"] == 64 for row in rows)


def test_a_wrong_model_is_one_sentence(tmp_path):
    command = [sys.executable, str(SCRIPT), "overhead", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("bench_engine: ") and done.stderr.count("\n") == 1
