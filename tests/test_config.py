import argparse

import pytest

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.flags import ConfigError, add_flags, from_args, nearest_flag
from hetero_glm5.model_config import ModelConfig

CARD = (
    "--host 0.0.0.0 --port 30000 --model /m --kt-weight-path /m --kt-cpuinfer 96 --kt-threadpool-count 2 "
    "--kt-num-gpu-experts 10 --kt-method {method} --kt-gpu-prefill-token-threshold 1024 "
    "--kt-enable-dynamic-expert-update --kt-expert-placement-strategy uniform --trust-remote-code "
    "--mem-fraction-static 0.75 --served-model-name GLM5 --enable-mixed-chunk --tensor-parallel-size 1 "
    "--enable-p2p-check --disable-shared-experts-fusion --chunked-prefill-size 16384 --max-running-requests 4 "
    "--max-total-tokens 128000 --attention-backend flashinfer --fp8-gemm-backend cutlass --kv-cache-dtype bf16 "
    "--tool-call-parser glm47 --reasoning-parser glm45 --watchdog-timeout 3000"
)
MACHINE = {"cuda": False, "cores": 2, "numa_nodes": (0,)}


def parse(line: str) -> tuple[EngineConfig, ServerConfig]:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")
    args = parser.parse_args(line.split())
    return from_args(EngineConfig, args), from_args(ServerConfig, args)


def model(**overrides) -> ModelConfig:
    return ModelConfig.parse(tiny_config(**overrides))


def test_the_cards_command_parses_and_says_what_has_no_effect():
    engine, server = parse(CARD.format(method="BF16") + " --device cpu")
    settled, notes = engine.resolve(model(), **MACHINE)
    assert settled.kt_cpuinfer == 2 and settled.device == "cpu" and settled.kv_cache_dtype == "bfloat16"
    assert (server.host, server.port, server.tool_call_parser, server.reasoning_parser) == (
        "0.0.0.0",
        30000,
        "glm47",
        "glm45",
    )
    for flag in ("kt-cpuinfer", "threadpool", "prefill-token", "dynamic", "attention-backend", "fp8-gemm", "p2p"):
        assert sum(flag in note for note in notes) == 1, flag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mem-fraction-static 1.5", ["--mem-fraction-static", "1.5"]),
        ("--kt-gpu-experts-ratio 2", ["--kt-gpu-experts-ratio", "2"]),
        ("--kt-gpu-prefill-token-threshold many", ["many", "number"]),
        ("--tensor-parallel-size 8", ["8", "Use 1"]),
        ("--kt-method BF15", ["BF15", "did you mean BF16"]),
        ("--kv-cache-dtype fp8_e4m3", ["fp8_e4m3"]),
        ("--kt-max-deferred-experts-per-token 2", ["deferral"]),
        ("--speculative-algorithm EAGLE", ["--speculative-algorithm"]),
        ("--speculative-config.method mtp", ["--speculative-config"]),
        ("--record-kt-gpu-expert-distribution", ["--record-kt-gpu-expert-distribution"]),
        ("--kt-expert-placement-strategy frequency", ["--init-expert-location"]),
        ("--init-expert-location f.pt", ["no effect", "uniform"]),
        ("--chunked-prefill-size 0", ["--chunked-prefill-size", "at least 1"]),
        ("--enable-auto-tool-choice", ["--tool-call-parser glm47"]),
        ("--port 70000", ["70000", "65535"]),
        ("--max-total-tokens 0", ["--max-total-tokens", "at least 1"]),
    ],
)
def test_flags_that_cannot_work_are_refused_in_a_sentence(flags, words):
    with pytest.raises(ConfigError) as error:
        parse(flags)
    assert all(word in str(error.value) for word in words) and str(error.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("flags", "overrides", "machine", "words"),
    [
        ("--device cuda", {}, {}, ["cuda", "--device cpu"]),
        ("--kt-method FP8", {}, {}, ["FP8", "BF16"]),
        ("--kt-num-gpu-experts 17", {}, {}, ["17", "16"]),
        ("--context-length 8192", {}, {}, ["8192", "4096"]),
        ("--kt-numa-nodes 0 1", {}, {}, ["0 1", "NUMA"]),
        ("--kt-enable-dynamic-expert-update", {}, {"cuda": True}, ["--kt-enable-dynamic-expert-update"]),
    ],
)
def test_flags_that_this_model_or_machine_refuses(flags, overrides, machine, words):
    engine, _ = parse(flags)
    with pytest.raises(ConfigError) as error:
        engine.resolve(model(**overrides), **(MACHINE | machine))
    assert all(word in str(error.value) for word in words)


def test_auto_method_follows_dtype_and_checkpoint():
    fp8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
    for line, overrides, method in [
        ("", {}, "BF16"),
        ("", fp8, "FP8"),
        ("--dtype float32", fp8, "FP32"),
        ("--kt-method FP8_BLOCK", fp8, "FP8"),
        ("--kt-method AMXINT8", fp8, "INT8"),
        ("--kt-method RAWINT4", {}, "INT4"),
    ]:
        settled, _ = parse(line)[0].resolve(model(**overrides), **MACHINE)
        assert settled.kt_method == method


def test_nearest_flag_names_the_closest():
    assert "did you mean --kt-cpuinfer" in nearest_flag("--kt-cpuinfr=3", ["--kt-cpuinfer", "--port"])
    assert "--help" in nearest_flag("--zzz", ["--kt-cpuinfer"])
