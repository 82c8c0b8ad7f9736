"""Nothing changes the tokens: fp32 greedy output is the same wherever experts are and however work is cut."""

import itertools
import shutil
from collections import Counter

import pytest
import torch
from cheap_link import weigh_by
from cuda_standin import PatientStream
from oracle import LATENT_EPS, oracle_logits, random_ids
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from hetero_glm5 import _C
from hetero_glm5.core import SamplingParams, UserError
from hetero_glm5.engine.scheduler import Scheduler
from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.llm import LLM
from hetero_glm5.weights.quantize import PackedExperts

PROMPTS = [random_ids(30, seed=1), random_ids(5, seed=2), random_ids(61, seed=3)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(checkpoints):
    return tiny_checkpoint(checkpoints)


def generate(folder, prompts=PROMPTS, params=GREEDY, **flags) -> list[list[int]]:
    flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS} | flags
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def plain(folder):
    """All experts on the host, two threads, one batch; and it is what the oracle would choose."""
    tokens = generate(folder)
    for prompt, output in zip(PROMPTS, tokens, strict=True):
        logits = oracle_logits(folder, prompt + output[:-1])[len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == output
    return tokens


@pytest.mark.parametrize("strategy", ["uniform", "front-loading", "random"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_placement(folder, plain, strategy, ratio):
    assert generate(folder, kt_gpu_experts_ratio=ratio, kt_expert_placement_strategy=strategy) == plain


def test_frequency_placement(folder, plain, tmp_path):
    counts = torch.randint(0, 99, (5, 16), generator=torch.Generator().manual_seed(0))
    save_file({"logical_count": counts}, str(tmp_path / "counts.safetensors"))
    flags = {"kt_expert_placement_strategy": "frequency", "init_expert_location": str(tmp_path / "counts.safetensors")}
    assert generate(folder, kt_num_gpu_experts=5, **flags) == plain


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(folder, plain, threads):
    assert generate(folder, kt_cpuinfer=threads, kt_num_gpu_experts=3) == plain


@pytest.mark.parametrize("isa", _C.isas())
def test_isa(folder, plain, monkeypatch, isa):
    monkeypatch.setenv("HETERO_GLM5_ISA", isa)
    with LLM(folder, device="cpu", skip_tokenizer=True, max_total_tokens=64) as llm:
        assert llm.engine.pool.isa == isa
    assert generate(folder) == plain


@pytest.mark.parametrize("chunk", [1, 3, 17, 64])
@pytest.mark.parametrize("mixed", [True, False])
def test_chunks(folder, plain, chunk, mixed):
    assert generate(folder, chunked_prefill_size=chunk, enable_mixed_chunk=mixed) == plain


def test_batch_mates(folder, plain):
    assert [generate(folder, [prompt])[0] for prompt in PROMPTS] == plain
    assert generate(folder, PROMPTS[::-1]) == plain[::-1]


def test_preemption(folder, plain, monkeypatch):
    """A pool that holds only one and a half of the sequences: they are preempted and computed again."""
    preempted = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, seq: (preempted.append(seq), preempt(self, seq)))
    assert generate(folder, max_total_tokens=120) == plain
    assert preempted


def test_prompts_are_scored_once_though_preempted(folder):
    """What was told of a prompt stays while its sequence is computed again."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    flags = {"page_size": 8, "device": "cpu", "dtype": "float32", "skip_tokenizer": True}
    scores, preemptions = [], []
    for pool in (104, 512):
        with LLM(folder, max_total_tokens=pool, **flags) as llm:
            scores.append([output.prompt_logprobs for output in llm.generate(PROMPTS, params)])
            preemptions.append(llm.engine.scheduler.counts.preemptions)
    assert preemptions[0] > 0 == preemptions[1] and scores[0] == scores[1]
    assert [len(each) for each in scores[0]] == [len(prompt) - 1 for prompt in PROMPTS]


def test_host_experts_on_a_stream(folder, plain, standin):
    """As with a GPU: the host part is enqueued, the device part runs meanwhile."""
    stream = PatientStream(standin, most_delay=100)
    flags = {"max_total_tokens": 512, "latent_norm_eps": LATENT_EPS, "kt_num_gpu_experts": 5}
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        llm.engine.runner.experts.stream = lambda device: stream
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == plain
        assert llm.engine.pool._streams.keys() == {(0, stream.handle)}
    stream.destroy()


MOVING = {
    "migration": {"kt_enable_dynamic_expert_update": True, "kt_num_gpu_experts": 5},
    "divided prefill": {"kt_gpu_prefill_token_threshold": "4"},
    "both": {
        "kt_enable_dynamic_expert_update": True,
        "kt_num_gpu_experts": 3,
        "kt_gpu_prefill_token_threshold": "16",
        "chunked_prefill_size": 20,
    },
}


@pytest.mark.parametrize("what", MOVING)
@pytest.mark.parametrize("on_a_stream", [False, True])
def test_experts_that_move(folder, plain, monkeypatch, standin, what, on_a_stream):
    """Under concurrent load, with misses that are fetched, and streamed experts; a cheap link makes all of it pay."""
    weigh_by(monkeypatch)
    flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS} | MOVING[what]
    stream = PatientStream(standin, most_delay=50)
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        tiers, copied = llm.engine.tiers, Counter()
        if on_a_stream:
            tiers.stream = lambda device: stream
        for line, copies in _lines(tiers).items():
            copy = copies.copy
            copies.copy = lambda *args, copy=copy, line=line: (copied.update([line]), copy(*args))
        first = None if tiers.adaptation is None else tiers.adaptation.slot_of.copy()
        for prompts, tokens in ((PROMPTS, plain), (PROMPTS[::-1], plain[::-1])):
            assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == tokens
        assert copied.keys() == _lines(tiers).keys()
        assert first is None or (first != tiers.adaptation.slot_of).any()
    stream.destroy()


def _lines(tiers):
    """What copies experts, by what for."""
    lines = {}
    if tiers.adaptation is not None:
        lines |= {"moves": tiers.adaptation.mover.background, "fetches": tiers.adaptation.mover.urgent}
    return lines if tiers.divided is None else lines | {"streamed": tiers.divided.copies}


def _failing(copies, monkeypatch, after: int):
    """Copies that leave rubbish and raise, from the call number `after` on."""
    calls, copy = itertools.count(), copies.copy

    def fail(target, source):
        if next(calls) < after:
            return copy(target, source)
        target.fill_(0xFF)
        raise RuntimeError("the link is down")

    monkeypatch.setattr(copies, "copy", fail)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_move_that_fails_touches_no_request(folder, plain, monkeypatch, after, caplog):
    weigh_by(monkeypatch)
    flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS} | MOVING["migration"]
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        tiers = llm.engine.tiers
        with monkeypatch.context() as patch:
            _failing(tiers.adaptation.mover.background, patch, after)
            assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == plain
        assert "the link is down" in caplog.text
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == plain
        assert (tiers.slot_of.numpy() == tiers.adaptation.slot_of).all()


@pytest.mark.parametrize("after", [0, 1])
def test_a_fetch_that_fails_ends_only_its_step(folder, plain, monkeypatch, after):
    """It is the step's error; the next requests find every expert where it is said to be."""
    weigh_by(monkeypatch)
    flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS} | MOVING["migration"]
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        with monkeypatch.context() as patch:
            _failing(llm.engine.tiers.adaptation.mover.urgent, patch, after)
            with pytest.raises(RuntimeError, match="the link is down"):
                llm.generate(PROMPTS, GREEDY)
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == plain


def test_deferral_is_the_same_for_every_batch(folder, plain):
    """It changes results, but a token's do not depend on its batch mates, chunks or threads."""
    flags = {"kt_max_deferred_experts_per_token": 2, "kt_num_gpu_experts": 3}
    tokens = generate(folder, **flags)
    assert tokens != plain
    assert [generate(folder, [prompt], **flags)[0] for prompt in PROMPTS] == tokens
    assert generate(folder, chunked_prefill_size=7, kt_cpuinfer=1, **flags) == tokens


def test_an_error_on_a_stream_ends_the_step(folder, plain, standin):
    """It is the step's error, not the NaN it leaves, and the next step is not touched by it."""
    stream = PatientStream(standin)
    flags = {"max_total_tokens": 512, "latent_norm_eps": LATENT_EPS}
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        tiers = llm.engine.runner.experts
        tiers.stream = lambda device: stream
        layer, good = next(iter(tiers.host.items()))
        tiers.host[layer] = CpuExperts(PackedExperts(good.packed.layout, good.packed.num_experts, []), pool=good.pool)
        with pytest.raises(ValueError, match="which is not resident on this tier"):
            llm.generate(PROMPTS, GREEDY)
        tiers.host[layer] = good
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == plain
    stream.destroy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
def test_cache_slots_are_written_before_they_are_read(folder, plain, dtype):
    want = generate(folder, kv_cache_dtype=dtype)
    assert (want == plain) == (dtype == "float32")
    flags = {"latent_norm_eps": LATENT_EPS, "kv_cache_dtype": dtype, "max_total_tokens": 512, "page_size": 8}
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, **flags) as llm:
        for store in llm.engine.runner.cache.stores:
            store.rows.view(torch.uint8).fill_(255)  # NaN in every format
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == want


@pytest.mark.parametrize("page", [1, 7, 256])
def test_pages(folder, plain, page):
    assert generate(folder, page_size=page) == plain


def test_seeded_sampling_does_not_see_its_neighbours(folder):
    params = [SamplingParams(max_tokens=16, seed=i, top_p=0.9, top_k=50, ignore_eos=True) for i in range(3)]
    together = generate(folder, params=params)
    alone = [generate(folder, [prompt], [p])[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    assert together == alone
    assert together != generate(folder, params=[SamplingParams(max_tokens=16, seed=9 + i) for i in range(3)])


def test_experts_from_another_folder(folder, plain, tmp_path):
    """--kt-weight-path: the routed experts come from there and nothing else; --model need not hold any."""
    tensors = load_file(str(folder / "model.safetensors"))
    routed = {name for name in tensors if ".mlp.experts." in name}
    for part, names in (("dense", tensors.keys() - routed), ("experts", routed)):
        (tmp_path / part).mkdir()
        save_file({name: tensors[name] for name in names}, str(tmp_path / part / "model.safetensors"))
        shutil.copy(folder / "config.json", tmp_path / part)
    assert generate(tmp_path / "dense", kt_weight_path=str(tmp_path / "experts")) == plain
    with pytest.raises(UserError, match="missing"):
        generate(tmp_path / "dense")


def test_no_end_token_before_min_tokens(folder, plain):
    """An end token that greedy decoding would draw at once is passed over until enough tokens are there."""
    end = plain[0][0]
    params = SamplingParams(max_tokens=12, min_tokens=5, temperature=0.0, stop_token_ids=(end,), ignore_eos=True)
    tokens = generate(folder, [PROMPTS[0]], params)[0]
    assert end not in tokens[:5]
    short = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(end,), ignore_eos=True)
    assert generate(folder, [PROMPTS[0]], short)[0] == [end]
