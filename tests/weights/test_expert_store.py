"""The packed store: what is written is what a checkpoint packs to, and what is damaged is said in a sentence."""

import dataclasses
import shutil
import subprocess
import sys
import zlib

import pytest
import torch
from oracle import random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from hetero_glm5 import _C, hardware
from hetero_glm5.config import EngineConfig
from hetero_glm5.core import SamplingParams, UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.llm import LLM
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.convert import Conversion
from hetero_glm5.weights.expert_source import CheckpointExperts
from hetero_glm5.weights.expert_store import ExpertStore, StoreError, is_store, layer_paths
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts

NODE = _C.topology()[0]["id"]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def packed_store(checkpoint, method="BF16", threads=2):
    """The store of a checkpoint, written once beside it."""
    out = checkpoint.with_name(f"{checkpoint.name}-{method}")
    if not out.exists():
        conversion = Conversion(checkpoint, out, method)
        conversion.run(threads)
        conversion.close()
    return out


@pytest.fixture
def checkpoint(checkpoints):
    return tiny_checkpoint(checkpoints, dtype="bfloat16")


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A store to damage."""
    return shutil.copytree(packed_store(checkpoint), tmp_path / "store")


@pytest.mark.parametrize("method", METHODS)
def test_a_store_holds_what_the_checkpoint_packs_to(checkpoints, method):
    folder = tiny_checkpoint(checkpoints, fp8=method == "FP8", dtype="bfloat16")
    store = ExpertStore(packed_store(folder, method))
    layout = store.layout
    source = CheckpointExperts(Checkpoint(folder), ExpertLayout(method, layout.hidden, layout.intermediate))
    want, got = torch.empty(2, layout.blob_bytes, dtype=torch.uint8)
    assert list(store.files) == [2, 3, 4, 5]  # the last is the MTP layer
    for layer, file in store.files.items():
        assert file.start % 4096 == 0 and file.head.layers == (2, 3, 4, 5)
        with safe_open(file.path, "pt") as opened:
            assert opened.keys() == ["experts"] and opened.metadata()["kind"] == "hetero_glm5 packed experts"
            tensor = opened.get_tensor("experts")
        packed = PackedExperts(layout, store.experts, [0, 5])
        for expert in range(store.experts):
            source.fill(want, layer, expert)
            store.read(layer, expert, got.fill_(255))
            assert torch.equal(got, want) and torch.equal(tensor[expert], want)
            assert file.checksums[expert] == zlib.crc32(want.numpy())
            if expert in packed.resident:
                store.map(layer, expert, packed)
                assert torch.equal(packed.blob(expert), want)
    assert store.verify(threads=2) == []
    store.close()
    assert torch.equal(packed.blob(0), tensor[0])  # stays mapped


def generate(folder, **flags):
    prompts = [random_ids(30, seed=1), random_ids(5, seed=2)]
    with LLM(folder, device="cpu", skip_tokenizer=True, max_total_tokens=256, **flags) as llm:
        return [output.token_ids for output in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize("mode", ["auto", "ram", "mmap"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_tokens_do_not_depend_on_where_experts_come_from(checkpoints, mode, ratio):
    folder = tiny_checkpoint(checkpoints)
    plain = generate(folder, dtype="float32")
    flags = {"kt_weight_path": str(packed_store(folder, "FP32")), "kt_weight_mode": mode}
    assert generate(folder, dtype="float32", kt_gpu_experts_ratio=ratio, **flags) == plain


@pytest.mark.parametrize("mode", [None, "ram", "mmap"])
@pytest.mark.parametrize("nodes", [[NODE], [NODE, NODE], [NODE] * 3])
def test_nor_on_whether_experts_are_divided(checkpoints, mode, nodes, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = tiny_checkpoint(checkpoints)
    plain = generate(folder, dtype="float32")
    assert "NUMA" not in caplog.text or len(_C.topology()) > 1
    flags = {"kt_weight_path": str(packed_store(folder, "FP32")), "kt_weight_mode": mode} if mode else {}
    monkeypatch.setattr(EngineConfig, "_settle_nodes", lambda *_: tuple(nodes))
    monkeypatch.setattr(_C, "binds_memory", lambda node: True)
    assert generate(folder, dtype="float32", kt_gpu_experts_ratio=0.3, **flags) == plain
    told = "stay in files" if mode == "mmap" else "divided over them" if len(nodes) > 1 else "all host experts"
    assert f"NUMA nodes {NODE} (" in caplog.text and told in caplog.text
    monkeypatch.setattr(_C, "binds_memory", lambda node: False)
    generate(folder, dtype="float32", **flags)
    assert ("refuses to bind memory" in caplog.text) == (mode != "mmap")


@pytest.mark.parametrize("method", ["BF16", "FP8"])
@pytest.mark.parametrize("mode", ["ram", "mmap"])
def test_nor_in_the_formats_that_are_served(checkpoints, method, mode):
    folder = tiny_checkpoint(checkpoints, fp8=method == "FP8", dtype="bfloat16")
    for ratio in (0.0, 0.4):
        plain = generate(folder, kt_gpu_experts_ratio=ratio)
        flags = {"kt_weight_path": str(packed_store(folder, method)), "kt_weight_mode": mode}
        assert generate(folder, kt_gpu_experts_ratio=ratio, **flags) == plain


def test_only_the_dense_weights_are_needed_beside_a_store(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".mlp.experts." not in k}, tmp_path / "model.safetensors")
    assert generate(tmp_path, kt_weight_path=str(packed_store(checkpoint))) == generate(checkpoint)


@pytest.mark.parametrize(("mode", "ratio"), [("ram", 0.4), ("mmap", 0.0), ("mmap", 0.4)])
def test_progress_counts_the_bytes_of_the_store(checkpoint, mode, ratio, monkeypatch):
    monkeypatch.setattr("hetero_glm5.weights.load.SECONDS_BETWEEN_REPORTS", 0.0)
    seen, store = [], ExpertStore(packed_store(checkpoint))
    config = EngineConfig(
        model=str(checkpoint), device="cpu", kt_weight_path=str(store.folder), kt_weight_mode=mode,
        kt_gpu_experts_ratio=ratio, max_total_tokens=64,
    )  # fmt: skip
    Engine.load(config, progress=seen.append).close()
    dense = next(p.bytes_total for p in seen if p.bytes_total)
    read = 48 if mode == "ram" else int(ratio * 48)
    last = seen[-1]
    assert last.bytes_done == last.bytes_total == dense - 48 * store.layout.blob_bytes + read * store.layout.blob_bytes


def test_experts_that_do_not_fit_in_memory_stay_in_files(checkpoint, caplog, monkeypatch):
    caplog.set_level("INFO")
    store = packed_store(checkpoint)
    machine = dataclasses.replace(hardware.probe(gpu=False), ram_available=16 << 20)  # 9 dense, 9 experts
    monkeypatch.setattr("hetero_glm5.engine.sizing.activation_bytes", lambda *_: 0)
    monkeypatch.setattr(hardware, "probe", lambda gpu: machine)
    tokens = generate(checkpoint, kt_weight_path=str(store))
    assert "do not fit in memory" in caplog.text and "in files" in caplog.text
    for flags in ({"kt_weight_path": str(store), "kt_weight_mode": "ram"}, {}):
        with pytest.raises(UserError, match="memory: .* host experts"):
            generate(checkpoint, **flags)
    monkeypatch.undo()
    assert tokens == generate(checkpoint)


def test_a_divided_expert_cannot_be_mapped(checkpoint):
    store = ExpertStore(packed_store(checkpoint))
    with pytest.raises(ValueError, match="divided over 2 NUMA nodes is no single piece"):
        store.map(3, 0, PackedExperts(store.layout, store.experts, nodes=[NODE] * 2))
    store.close()


def rewrite(path, old, new):
    """Changes the header, its length kept."""
    content = path.read_bytes()
    assert len(old) == len(new) and content[:8192].count(old) == 1
    path.write_bytes(content.replace(old, new, 1))


def flip(path, expert):
    layer = next(file for file in ExpertStore(path.parent).files.values() if file.path == path)
    with path.open("r+b") as file:
        file.seek(layer.offset(expert) + 1234)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def cut(path, experts):
    size = next(iter(ExpertStore(path.parent).files.values())).offset(experts) + 100
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES = {
    "truncated": (lambda f: cut(f, 5), ["layer 3", "expert 5 is cut", "quantize again"]),
    "truncated in its header": (lambda f: f.write_bytes(f.read_bytes()[:100]), ["truncated", "100 bytes"]),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), ["layer 3", "bytes long and should be"]),
    "another layout version": (
        lambda f: rewrite(f, f'layout_version": "{_C.LAYOUT_VERSION}"'.encode(), b'layout_version": "9"'),
        ["layer 3", "layout version 9", f"reads {_C.LAYOUT_VERSION}", "quantize"],
    ),
    "an unknown method": (lambda f: rewrite(f, b"BF16", b"BF17"), ["layer 3", "cannot read", "BF17"]),
    "other dimensions": (lambda f: rewrite(f, b": 256", b": 512"), ["layer 3", "contradicts itself"]),
    "another layer's number": (lambda f: rewrite(f, b'"layer": "3"', b'"layer": "4"'), ["contradicts itself"]),
    "no packed experts": (lambda f: rewrite(f, b"packed", b"raw   "), ["layer 3", "no file of packed experts"]),
    "missing": (lambda f: f.unlink(), ["layer-00003.safetensors (layer 3) is missing", "quantize again"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_refused_when_it_is_opened(checkpoint, copy, name):
    damage, words = DAMAGES[name]
    damage(copy / "layer-00003.safetensors")
    with pytest.raises(UserError) as error:
        generate(checkpoint, kt_weight_path=str(copy))
    message = str(error.value)
    assert all(word in message for word in ["layer-00003.safetensors", *words]), message
    assert "\n" not in message and message.endswith(".")


def test_a_corrupt_expert_is_found_by_verify_and_by_reading(checkpoint, copy):
    flip(copy / "layer-00003.safetensors", 7)
    flip(copy / "layer-00004.safetensors", 0)
    first, second = ExpertStore(copy).verify(threads=2)
    assert "layer-00003.safetensors is damaged: expert 7 of layer 3" in first and "expert 0 of layer 4" in second
    with pytest.raises(StoreError, match=r"layer-00003.safetensors is damaged: expert 7 of layer 3 .* quantize again"):
        generate(checkpoint, kt_weight_path=str(copy))
    generate(checkpoint, kt_weight_path=str(copy), kt_weight_mode="mmap")  # not looked at


def test_a_store_of_another_model_is_refused(checkpoints, checkpoint):
    path = str(packed_store(checkpoint))
    with pytest.raises(StoreError, match=r"layer-00002.*packed from another model .* router weights differ"):
        generate(tiny_checkpoint(checkpoints, dtype="bfloat16", seed=1), kt_weight_path=path)
    with pytest.raises(
        StoreError, match="holds 16 experts of hidden size 256 and width 128; the model has 16 of .* 64"
    ):
        generate(tiny_checkpoint(checkpoints, dtype="bfloat16", moe_intermediate_size=64), kt_weight_path=path)
    deeper = tiny_checkpoint(checkpoints, dtype="bfloat16", num_hidden_layers=7)
    with pytest.raises(StoreError, match=r"layer-00006.* \(layer 6\) is missing; the model needs it"):
        generate(deeper, kt_weight_path=path)


def test_the_other_releases_of_a_model_share_its_stores(checkpoints):
    """The routers of BF16 and FP8 releases are the same weights, so FP8 experts serve beside BF16 dense layers."""
    path = packed_store(tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=True), "FP8")
    assert generate(tiny_checkpoint(checkpoints, dtype="bfloat16"), kt_weight_path=str(path))


def test_files_of_two_stores_do_not_mix(checkpoints, copy):
    other = packed_store(tiny_checkpoint(checkpoints, dtype="bfloat16"), "FP32")
    shutil.copy(other / "layer-00004.safetensors", copy)
    with pytest.raises(StoreError, match=r"\(layer 4\) and layer-00002.safetensors are of different stores"):
        ExpertStore(copy)


def test_what_is_a_store(checkpoint, tmp_path):
    assert is_store(packed_store(checkpoint)) and not is_store(checkpoint) and not is_store(tmp_path / "nowhere")
    (tmp_path / "layer-1.safetensors").touch()
    assert not list(layer_paths(tmp_path))
    with pytest.raises(StoreError, match="holds no packed experts"):
        ExpertStore(tmp_path)


PEAK = """
import sys
from hetero_glm5.llm import LLM
memory = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if key in line) << 10
path, mode, ratio = sys.argv[2], sys.argv[3], float(sys.argv[4])
before = memory("VmRSS")
llm = LLM(sys.argv[1], device="cpu", skip_tokenizer=True, max_total_tokens=64, kt_weight_path=path or None,
          kt_weight_mode=mode, kt_gpu_experts_ratio=ratio)
print(memory("VmRSS") - before, memory("VmHWM") - memory("VmRSS"))
"""


@pytest.fixture(scope="module")
def large(checkpoints):
    """A checkpoint whose 64 experts take 402 MB, 6.3 MB each."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 32}
    return tiny_checkpoint(checkpoints, dtype="bfloat16", num_hidden_layers=4, num_nextn_predict_layers=0, **sizes)


@pytest.mark.parametrize(
    ("packed", "mode", "ratio"),
    [(True, "ram", 0.0), (True, "ram", 0.5), (True, "mmap", 0.0), (False, "auto", 0.0), (False, "auto", 0.5)],
)
def test_loading_takes_little_more_memory_than_what_stays(large, packed, mode, ratio):
    path = str(packed_store(large)) if packed else ""
    command = [sys.executable, "-c", PEAK, str(large), path, mode, str(ratio)]
    stays, above = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    experts = 64 * 3 * 1024 * 1024 * 2
    assert (stays < experts / 2) if mode == "mmap" else (stays > experts)
    assert above < 256e6  # loaders hold a few experts, and malloc keeps some of what they gave back
