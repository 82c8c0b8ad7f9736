import shutil

import pytest
from shapes import GLM5
from tiny import tiny_checkpoint

from hetero_glm5 import hardware
from hetero_glm5.cli.fitting import Experts, fit, missing, other_ways
from hetero_glm5.config import EngineConfig
from hetero_glm5.core import UserError
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.demo.random_checkpoint import write_checkpoint
from hetero_glm5.engine.engine import Engine
from hetero_glm5.hardware import Hardware, NumaNode
from hetero_glm5.model_config import DEMO, ModelConfig, checkpoint_folder
from hetero_glm5.placement.memory import GIB
from hetero_glm5.weights.convert import Conversion
from hetero_glm5.weights.quantize import ExpertLayout


def machine(ram, gpu=0.0, nodes=1, cores=2):
    each = {i: NumaNode(cores // nodes, int(ram * GIB) // nodes) for i in range(nodes)}
    return Hardware("a cpu", each, int(ram * GIB), "a gpu" if gpu else None, int(gpu * GIB))


CASES = {
    "plain": {},
    "device experts": {"kt_num_gpu_experts": 3, "kt_method": "INT4"},
    "ratio": {"kt_gpu_experts_ratio": 0.3, "kt_method": "INT8", "kv_cache_dtype": "fp8_e4m3"},
    "moving": {"kt_num_gpu_experts": 2, "kt_enable_dynamic_expert_update": True},
    "drafts": {"speculative_algorithm": "MTP", "dtype": "float32"},
    "pool": {"max_total_tokens": 1000, "kv_host_size": 0.01, "chunked_prefill_size": 128},
}


def planned(config, folder, here):
    model = ModelConfig.load(folder)
    return fit(config, model, Experts.of(config, model), here)


def compared(monkeypatch, config, folder):
    """What the plan says of `folder`, after the engine said the same of config.model."""
    here = machine(0.6)
    monkeypatch.setattr(hardware, "probe", lambda *, gpu: here)
    engine = Engine.load(config)
    found = planned(config, folder, here)
    try:
        assert found.memory == engine.memory and found.context_length == engine.context_length
        assert found.settled == engine.config
        assert found.memory.needs.device_experts == len(engine.tiers.device.slots)
        assert found.memory.kv_tokens == engine.scheduler.cache.pool.num_pages * config.page_size
    finally:
        engine.close()
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_the_engine_computes_for_the_demo_model(monkeypatch, case):
    folder = checkpoint_folder(DEMO)
    config = EngineConfig(model=folder, device="cpu", **{"max_running_requests": 2, **CASES[case]})
    found = compared(monkeypatch, config, folder)
    assert found.memory.kv_tokens > 0 and (found.share > 0) == (case in ("device experts", "ratio", "moving"))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_folder_with_config_json_alone(monkeypatch, checkpoints, tmp_path, fp8):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=fp8)
    shutil.copy(folder / "config.json", tmp_path)
    found = compared(monkeypatch, EngineConfig(model=str(folder), device="cpu", max_running_requests=2), tmp_path)
    config = EngineConfig(model=str(tmp_path), device="cpu", max_running_requests=2)
    assert planned(config, tmp_path, machine(0.6)).memory == found.memory
    assert found.settled.kt_method == ("FP8" if fp8 else "BF16")


def test_an_index_without_its_shards(monkeypatch, checkpoints, tmp_path):
    folder = write_checkpoint(tmp_path / "sharded", tiny_config(), dtype="bfloat16", fp8=True, shard_bytes=1 << 18)
    (tmp_path / "index").mkdir()
    for name in ("model.safetensors.index.json", "config.json"):
        shutil.copy(folder / name, tmp_path / "index")
    data = (tmp_path / "index/config.json").read_text().replace("quantization_config", "was")
    (tmp_path / "index/config.json").write_text(data)  # the names decide
    config = EngineConfig(model=str(folder), device="cpu", max_running_requests=2)
    assert compared(monkeypatch, config, tmp_path / "index").settled.kt_method == "FP8"


def test_a_packed_store_is_mapped_where_it_does_not_fit(monkeypatch, checkpoints, tmp_path):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16")
    conversion = Conversion(folder, tmp_path / "store", "INT4")
    conversion.run(1, lambda progress: None)
    conversion.close()
    config = EngineConfig(model=str(folder), kt_weight_path=str(tmp_path / "store"), device="cpu")
    assert compared(monkeypatch, config, folder).settled.kt_method == "INT4"
    whole = planned(config, folder, machine(1)).memory
    needed = (whole.needs.dense + whole.needs.activations) / 0.85
    assert planned(config, folder, machine((needed + (1 << 20)) / GIB)).memory.needs.mapped


GLM = ModelConfig.parse(GLM5 | {"eos_token_id": 1})
BF16 = EngineConfig(model="GLM-5")


EXPERTS = Experts("", None, lambda method: ExpertLayout(method, GLM.hidden_size, GLM.moe_intermediate_size))


def test_what_is_missing_is_exactly_that():
    def fits(here):
        try:
            return bool(fit(BF16, GLM, EXPERTS, here))
        except UserError:
            return False

    assert missing(machine(2000, 100), fits) == {}
    short = missing(machine(500, 24), fits)
    assert list(short) == ["RAM", "GPU memory"]
    assert fits(machine(500 + short["RAM"], 24 + short["GPU memory"]))
    assert not fits(machine(499 + short["RAM"], 24 + short["GPU memory"]))
    assert not fits(machine(500 + short["RAM"], 23 + short["GPU memory"]))
    experts = 75 * 256 * 72 / 1024  # GiB
    assert short["RAM"] == pytest.approx(experts / 0.95 - 500, abs=2)
    assert missing(machine(500), fits)["RAM"] == pytest.approx((experts + 37.5) / 0.85 - 500, abs=2)


@pytest.mark.parametrize(
    ("here", "phrase"),
    [
        (machine(1000, 96), "experts in INT8"),
        (machine(500, 96), "experts in INT4"),
        (machine(300, 96), "experts in INT4 in a store that stays on disk (mmap)"),
        (machine(600, 24), "experts in INT4, attention on the CPU"),
        (machine(189), "experts in INT4 in a store that stays on disk (mmap)"),
        (machine(24), None),
    ],
)
def test_the_nearest_that_fits(here, phrase):
    way = next((way for way in other_ways(BF16, EXPERTS, here.cuda) if way.fits(GLM, here)), None)
    assert (way and way.phrase) == phrase
    if way:
        found = way.fit(GLM, here)
        assert found.pack_as == found.settled.kt_method == phrase.split()[2].strip(",")
        assert found.memory.needs.mapped == ("mmap" in phrase)


def test_device_experts_are_the_first_to_go():
    config = EngineConfig(model="GLM-5", kt_num_gpu_experts=200, kt_method="INT4")
    way = next(other_ways(config, EXPERTS, gpu=True))
    assert way.phrase == "no experts on the device" and way.config.kt_num_gpu_experts == 0
    assert way.fits(GLM, machine(800, 96))
