"""What a user can get wrong with files and budgets: each is one sentence that names the thing, none a traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from hetero_glm5.core import RequestError, SamplingParams, UserError
from hetero_glm5.llm import LLM


@pytest.fixture(scope="module")
def source(checkpoints):
    return tiny_checkpoint(checkpoints)


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


GATE = "model.layers.2.mlp.experts.3.gate_proj.weight"
DAMAGES = {
    "no such folder": (lambda f: shutil.rmtree(f), ["not a checkpoint", "config.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither", "model.safetensors"]),
    "truncated shard": (truncate, ["truncated", "Fetch the shard again"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "no valid JSON"]),
    "another architecture": (lambda f: change_config(f, model_type="llama"), ["llama", "glm_moe_dsa"]),
    "a key is missing": (lambda f: change_config(f, index_topk=None), ["index_topk", "complete"]),
    "a width that does not fit": (lambda f: change_config(f, hidden_size=260), ["shape", "expected", "260"]),
    "a tensor is missing": (lambda f: change_tensors(f, lambda t: t.pop(GATE)), ["1 missing", GATE]),
    "a stray tensor": (
        lambda f: change_tensors(f, lambda t: t.update(stray=torch.zeros(1))),
        ["1 unexpected", "stray"],
    ),
    "a tensor of another shape": (
        lambda f: change_tensors(f, lambda t: t.update({GATE: torch.zeros(3, 4)})),
        [GATE, "[3, 4]", "[128, 256]"],
    ),
    "a tensor of another type": (
        lambda f: change_tensors(f, lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
        [GATE, "I8", "expected"],
    ),
    "FP8 without its scale": (
        lambda f: change_tensors(f, lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
        [GATE, "no scale_inv"],
    ),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("junk"), ["tokenizer.json"]),
    "tokenizer is missing": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(folder, name):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError) as error:
        LLM(str(folder), device="cpu")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


FLAGS = {
    "an unknown flag": ({"kt_cpuinfr": 2}, ["kt_cpuinfr", "did you mean kt_cpuinfer"]),
    "more experts than there are": ({"kt_num_gpu_experts": 17}, ["17", "16"]),
    "a pool beyond memory": ({"max_total_tokens": 10**12}, ["KV pool", "budget", "--max-total-tokens"]),
    "no room for one page": ({"mem_fraction_static": 1e-9}, ["dense weights", "--mem-fraction-static"]),
    "a longer context than the pool": ({"context_length": 2000, "max_total_tokens": 512}, ["2000", "512 tokens"]),
    "a longer context than the model's": ({"context_length": 10**6}, ["1000000", "4096"]),
    "FP8 experts of another checkpoint": ({"kt_method": "FP8"}, ["FP8", "BF16"]),
    "experts from nowhere": ({"kt_weight_path": "/nowhere"}, ["/nowhere", "neither"]),
    "counts from nowhere": (
        {"kt_expert_placement_strategy": "frequency", "init_expert_location": "/nowhere.pt"},
        ["/nowhere.pt", "cannot be read"],
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_do_not_fit(source, name):
    flags, words = FLAGS[name]
    with pytest.raises(UserError) as error:
        LLM(str(source), device="cpu", **flags)
    message = str(error.value)
    assert all(word in message for word in words), message


REQUESTS = {
    "an empty prompt": ([], {}, ["empty"]),
    "a token beyond the vocabulary": ([1, 512], {}, ["512", "511"]),
    "a prompt too long": ([1] * 64, {}, ["64 tokens", "--max-total-tokens"]),
    "half a token": ([1.5, 2], {}, ["1.5", "whole"]),
    "an answer too long": ([1] * 30, {"max_tokens": 35}, ["35", "leaves 34"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_cannot_be_served_leave_the_engine_serving(source, name):
    prompt, params, words = REQUESTS[name]
    with LLM(str(source), device="cpu", max_total_tokens=64) as llm:
        with pytest.raises(RequestError) as error:
            llm.generate([prompt], SamplingParams(**params))
        assert all(word in str(error.value) for word in words)
        assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens is 3.*max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": None}, "temperature is None"),
        ({"stop": (1,)}, "stop is"),
        ({"stop": ["x"] * 65}, "65 strings; at most 64"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids is"),
    ],
)
def test_sampling_parameters_out_of_range(values, words):
    with pytest.raises(RequestError, match=words) as error:
        SamplingParams(**values)
    assert error.value.param == next(iter(values))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), "prompts is NoneType"),
        (({"a": 1},), "prompts is dict"),
        (([1.5],), "a prompt is 1.5"),
        (([[1]], {"max_tokens": 2}), "SamplingParams"),
        (([[1]], [SamplingParams()] * 2), "1 prompts need one"),
        (([[1]], SamplingParams(stop_token_ids=(512,))), "512; ids lie between 0 and 511"),
    ],
)
def test_arguments_of_another_kind(source, arguments, words):
    with LLM(str(source), device="cpu", max_total_tokens=64) as llm, pytest.raises(RequestError, match=words):
        llm.generate(*arguments)


def test_an_llm_is_used_by_one_thread_while_it_is_open(source):
    llm = LLM(str(source), device="cpu", max_total_tokens=64)
    with llm._alone(), pytest.raises(UserError, match="another thread"):
        llm.generate([[1]])
    llm.close()
    with pytest.raises(UserError, match="closed"):
        llm.generate([[1]])
    for path in (None, 5):
        with pytest.raises(UserError, match="checkpoint folder"):
            LLM(path)


def test_a_router_that_is_not_finite_is_refused(folder):
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    change_tensors(folder, lambda t: t[name].fill_(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        LLM(str(folder), device="cpu")


def test_logits_that_fail_leave_nothing_behind(source):
    with LLM(str(source), device="cpu", max_total_tokens=64) as llm:
        forward, llm.engine.runner.forward = llm.engine.runner.forward, None
        with pytest.raises(TypeError):
            llm.logits([1, 2, 3])
        llm.engine.runner.forward = forward
        assert not llm.engine.busy and llm.logits([1, 2, 3]).shape == (3, 512)


@pytest.mark.parametrize("context", [1, 7, 100])
def test_a_context_that_is_no_multiple_of_the_page_is_served_whole(source, context):
    with LLM(str(source), device="cpu", context_length=context + 1, max_running_requests=1, page_size=64) as llm:
        assert llm.engine.context_length == context + 1
        assert len(llm.generate([[1] * context], SamplingParams(ignore_eos=True))[0].token_ids) == 1
