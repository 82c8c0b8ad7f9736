import argparse

import pytest

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.flags import ConfigError, add_flags, from_args, nearest_flag, to_args
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
TWO_NODES = {"node_cores": {0: 4, 3: 2}}
MACHINE = {"cuda": False, "node_cores": {0: 2}}


def parse(line: str) -> tuple[EngineConfig, ServerConfig]:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")
    args = parser.parse_args(line.split())
    return from_args(EngineConfig, args), from_args(ServerConfig, args)


def model(**overrides) -> ModelConfig:
    return ModelConfig.parse(tiny_config(**overrides))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cards_command_parses_and_says_what_has_no_effect(device):
    engine, server = parse(CARD.format(method="BF16") + f" --device {device}")
    settled, notes = engine.resolve(model(), **MACHINE | {"cuda": device == "cuda"})
    assert settled.kt_cpuinfer == 2 and settled.device == device and settled.kv_cache_dtype == "bfloat16"
    assert (server.host, server.port, server.tool_call_parser, server.reasoning_parser) == (
        "0.0.0.0",
        30000,
        "glm47",
        "glm45",
    )
    for flag in ("kt-cpuinfer", "threadpool", "attention-backend", "fp8-gemm", "p2p"):
        assert sum(flag in note for note in notes) == 1, flag
    for flag in ("prefill-token", "dynamic"):
        assert sum(flag in note for note in notes) == (device == "cpu"), flag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mem-fraction-static 1.5", ["--mem-fraction-static", "1.5"]),
        ("--kt-gpu-experts-ratio 2", ["--kt-gpu-experts-ratio", "2"]),
        ("--kt-gpu-prefill-token-threshold many", ["many", "number"]),
        ("--kt-gpu-prefill-token-threshold ²", ["²", "number"]),
        ("--latent-norm-eps inf", ["--latent-norm-eps", "inf"]),
        ("--tensor-parallel-size 8", ["8", "Use 1"]),
        ("--kt-method BF15", ["BF15", "did you mean BF16"]),
        ("--speculative-num-steps 2", ["--speculative-num-steps needs", "--speculative-algorithm MTP"]),
        ("--speculative-algorithm EAGLE --speculative-eagle-topk 4", ["--speculative-eagle-topk is 4", "Use 1"]),
        (
            "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-num-draft-tokens 3",
            ["--speculative-num-draft-tokens is 3", "3 draft steps", "4. Leave it out"],
        ),
        ("--speculative-algorithm MTP --speculative-config.method mtp", ["two spellings", "Leave one"]),
        ("--speculative-config.num_speculative_tokens 1", ["needs --speculative-config.method mtp"]),
        ("--kv-disk-size 3", ["--kv-disk-size needs --kv-disk-path"]),
        ("--kv-host-size 3 --disable-radix-cache", ["--disable-radix-cache turns off"]),
        ("--expert-distribution-recorder-mode per_token", ["per_token", "must be one of stat"]),
        ("--expert-distribution-recorder-buffer-size 0", ["--expert-distribution-recorder-buffer-size is 0", "-1"]),
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
        ("--kt-method FP8 --kt-weight-path s", {}, {"packed_as": "BF16"}, ["packed as BF16", "s ", "Use auto"]),
        (
            "--kt-max-deferred-experts-per-token 2 --kt-enable-dynamic-expert-update",
            {},
            {},
            ["--kt-max-deferred-experts-per-token 2", "--kt-enable-dynamic-expert-update", "Leave one"],
        ),
        ("--kt-weight-mode mmap", {}, {}, ["--kt-weight-mode mmap", "hetero-glm5 quantize", "--kt-weight-path"]),
        ("--kt-num-gpu-experts 17", {}, {}, ["17", "16"]),
        ("--context-length 8192", {}, {}, ["8192", "4096"]),
        ("--kt-numa-nodes 0 1", {}, {}, ["--kt-numa-nodes names node 1", "NUMA node 0."]),
        ("--kt-numa-nodes 0 2", {}, TWO_NODES, ["names node 2", "NUMA nodes 0, 3"]),
        ("--kt-numa-nodes 3 3", {}, TWO_NODES, ["3, 3 names a node twice"]),
        ("--kt-numa-nodes 3 --kt-threadpool-count 2", {}, TWO_NODES, ["--kt-threadpool-count is 2", "names 1;"]),
        ("--kt-threadpool-count 3", {}, TWO_NODES, ["--kt-threadpool-count is 3", "NUMA nodes 0, 3", "Use 2"]),
        ("--kt-cpuinfer 1", {}, TWO_NODES, ["--kt-cpuinfer is 1", "NUMA nodes 0, 3", "Use at least 2"]),
    ],
)
def test_flags_that_this_model_or_machine_refuses(flags, overrides, machine, words):
    engine, _ = parse(flags)
    with pytest.raises(ConfigError) as error:
        engine.resolve(model(**overrides), **(MACHINE | machine))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("flags", "node_cores", "nodes", "threads", "noted"),
    [
        ("", {0: 2}, (), 2, []),
        ("--kt-threadpool-count 1", {0: 2}, (), 2, []),
        ("--kt-threadpool-count 2", {0: 2}, (), 2, ["--kt-threadpool-count 2: this process may use NUMA node 0,"]),
        ("--kt-threadpool-count 2 --kt-cpuinfer 1", {5: 2}, (), 1, ["NUMA node 5"]),
        ("--kt-numa-nodes 0", {0: 2}, (0,), 2, []),
        ("", {0: 4, 3: 2}, (0, 3), 6, []),
        ("--kt-cpuinfer 2", {0: 4, 3: 2}, (0, 3), 2, []),
        ("--kt-cpuinfer 9", {0: 4, 3: 2}, (0, 3), 6, ["9: this process may use 6 physical cores of NUMA nodes 0, 3"]),
        ("--kt-threadpool-count 1", {0: 4, 3: 2}, (0,), 4, []),
        ("--kt-threadpool-count 1 --kt-cpuinfer 6", {0: 4, 3: 2}, (0,), 4, ["may use 4 physical cores of"]),
        ("--kt-threadpool-count 2", {0: 4, 3: 2, 4: 2}, (0, 3), 6, []),
        ("--kt-numa-nodes 3", {0: 4, 3: 2}, (3,), 2, []),
        ("--kt-numa-nodes 4 0 --kt-threadpool-count 2", {0: 4, 3: 2, 4: 2}, (4, 0), 6, []),
    ],
)
def test_numa_flags(flags, node_cores, nodes, threads, noted):
    settled, notes = parse(flags)[0].resolve(model(), cuda=False, node_cores=node_cores)
    assert (settled.kt_numa_nodes, settled.kt_cpuinfer) == (nodes, threads)
    assert settled.kt_threadpool_count == max(1, len(nodes))
    assert len(notes) == len(noted) and all(words in note for words, note in zip(noted, notes, strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"kt_cpuinfer": "2"},
        {"kt_cpuinfer": 2.5},
        {"max_total_tokens": 100.0},
        {"enable_mixed_chunk": "no"},
        {"device": None},
        {"kt_numa_nodes": 0},
        {"mem_fraction_static": "0.5"},
        {"init_expert_location": 5},
    ],
)
def test_values_of_another_type_are_refused(values):
    with pytest.raises(ConfigError, match="it must be"):
        EngineConfig(**values)


def test_auto_method_follows_dtype_and_experts():
    for line, quantised_as, method in [
        ("", "", "BF16"),
        ("", "FP8", "FP8"),
        ("", "INT4", "INT4"),
        ("--dtype float32", "INT4", "FP32"),
        ("--dtype float32", "FP8", "FP32"),
        ("--kt-method FP8_BLOCK", "FP8", "FP8"),
        ("--kt-method BF16", "INT4", "BF16"),
        ("--kt-method AMXINT8", "FP8", "INT8"),
        ("--kt-method RAWINT4", "", "INT4"),
    ]:
        settled, _ = parse(line)[0].resolve(model(), **MACHINE, quantised_as=quantised_as)
        assert settled.kt_method == method


@pytest.mark.parametrize("line", ["", "--dtype float32", "--kt-method FP8", "--kt-method FP8_BLOCK"])
def test_auto_method_is_what_the_store_holds(line):
    settled, _ = parse(line)[0].resolve(model(), **MACHINE, packed_as="FP8")
    assert settled.kt_method == "FP8"


@pytest.mark.parametrize(("threshold", "noted"), [("0", False), ("00", False), ("64", True), ("auto", True)])
def test_a_prefill_threshold_of_zero_means_never(threshold, noted):
    _, notes = parse(f"--kt-gpu-prefill-token-threshold {threshold}")[0].resolve(model(), **MACHINE)
    assert any("prefill-token-threshold" in note for note in notes) == noted


def test_nearest_flag_names_the_closest():
    assert "did you mean --kt-cpuinfer" in nearest_flag("--kt-cpuinfr=3", ["--kt-cpuinfer", "--port"])
    assert "--help" in nearest_flag("--zzz", ["--kt-cpuinfer"])


def test_a_config_is_told_as_the_flags_that_give_it():
    engine, server = parse(CARD.format(method="FP8") + " --kt-numa-nodes 0 1 --no-enable-mixed-chunk")
    assert parse(" ".join([*to_args(engine), *to_args(server)])) == (engine, server)
    assert "--no-enable-mixed-chunk" in to_args(engine) and to_args(EngineConfig()) == []
