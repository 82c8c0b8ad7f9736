import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError, dequantise
from hetero_glm5.weights.names import TensorSpec


def write(folder, tensors, index=True):
    save_file(tensors, str(folder / "model-1.safetensors"))
    if index:
        weight_map = dict.fromkeys(tensors, "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def specs(tensors, **changes):
    return {name: TensorSpec(tuple(t.shape)) for name, t in tensors.items()} | changes


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_read_converts(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr("hetero_glm5.weights.checkpoint.BLOCK_BYTES", 1000)  # many blocks
    tensors = {"w": torch.randn(517, 7).to(stored), "v": torch.randn(9).to(stored), "e": torch.empty(0, 3)}
    checkpoint = Checkpoint(write(tmp_path, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name, wanted), tensor.to(wanted))
        assert torch.equal(checkpoint.read_raw(name)[0], tensor)
    for got, want in zip(checkpoint.read_raw(*tensors), tensors.values(), strict=True):
        assert torch.equal(got, want)
    assert checkpoint.bytes_read >= sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("shape", [(128, 128), (576, 300), (160, 129), (1, 1), (127, 257)])
def test_fp8_blocks_are_ragged_at_the_edges(tmp_path, monkeypatch, shape):
    monkeypatch.setattr("hetero_glm5.weights.checkpoint.BLOCK_BYTES", 128 * shape[1])  # one block row at a time
    rows, cols = shape
    q = torch.randint(0, 255, shape, dtype=torch.uint8)
    q[q == 127] = 8  # 0x7f and 0xff are NaN
    q = q.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-cols // 128)) + 0.1
    checkpoint = Checkpoint(write(tmp_path, {"w": q, "w_scale_inv": scales}))
    want = torch.empty(shape)
    for r in range(rows):
        want[r] = q[r].float() * scales[r // 128].repeat_interleave(128)[:cols]
    assert torch.equal(checkpoint.read("w", torch.float32), want)
    assert torch.equal(dequantise(q, scales), want)
    checkpoint.check({}, {"w": TensorSpec(shape, quantised=True)})


def test_everything_wrong_is_told_at_once(tmp_path):
    tensors = {
        "right": torch.zeros(2, 2),
        "shaped": torch.zeros(3, 2),
        "stray": torch.zeros(1),
        "fp8": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "scaled": torch.zeros(4, 4),
        "scaled_scale_inv": torch.ones(1, 1),
        "grid": torch.zeros(130, 4).to(torch.float8_e4m3fn),
        "grid_scale_inv": torch.ones(1, 1),
        "bias": torch.zeros(2, dtype=torch.bfloat16),
        "counts": torch.zeros(2, dtype=torch.int64),
    }
    known = {
        "right": TensorSpec((2, 2)),
        "shaped": TensorSpec((2, 2)),
        "fp8": TensorSpec((4, 4), True),
        "scaled": TensorSpec((4, 4), True),
        "grid": TensorSpec((130, 4), True),
        "bias": TensorSpec((2,), dtypes=("F32",)),
        "counts": TensorSpec((2,)),
        "gone": TensorSpec((1,)),
    }
    with pytest.raises(CheckpointError) as error:
        Checkpoint(write(tmp_path, tensors)).check(known, known)
    for words in (
        "1 missing: gone",
        "1 unexpected: stray",
        "shaped has shape [3, 2], expected [2, 2]",
        "fp8 is FP8 but has no scale_inv",
        "scaled has a scale_inv but is F32",
        "grid_scale_inv has shape [1, 1], expected [2, 1]",
        "bias is BF16, expected F32",
        "counts is I64",
    ):
        assert words in str(error.value)
    assert "right" not in str(error.value)


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(CheckpointError, match="100 missing: t0, .* and 88 more"):
        known = {f"t{i}": TensorSpec((1,)) for i in range(100)}
        Checkpoint(write(tmp_path, {"x": torch.zeros(1)})).check(known, known | {"x": TensorSpec((1,))})


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)
    write(tmp_path, {"w": torch.zeros(100)})
    shard = tmp_path / "model-1.safetensors"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"model-1.safetensors is truncated: w ends at byte"):
        Checkpoint(tmp_path)
    for damage in (b"", whole[:5], b"\xff" * 64, struct.pack("<Q", 10) + b"{not json}" + b"0" * 50):
        shard.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"model-1.safetensors (is no safetensors|has a damaged)"):
            Checkpoint(tmp_path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 16)
    with pytest.raises(CheckpointError, match="has 8 bytes"):
        Checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 1 shards: model-1.safetensors"):
        Checkpoint(tmp_path)


def shard(path, header: str, size: int = 64):
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * size)


@pytest.mark.parametrize(
    "tensors",
    [
        '{"w": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}',
        '{"w": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 16]}}',
        '{"w": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}',
        '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}',
        '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}}',
        '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "w": 5}',
        '{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "v": {"dtype": "F32", "shape": [4], '
        '"data_offsets": [8, 24]}}',
        "[" * 100_000,
    ],
)
def test_headers_that_lie_are_refused(tmp_path, tensors):
    shard(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="model.safetensors has a damaged safetensors header"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../out.safetensors", "", ".", "x" * 5000, "/tmp/x", "folder"])
def test_an_index_may_name_files_of_its_folder_only(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="same folder|lacks 1 of its 1 shards"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for i in (1, 2):
        save_file({"w": torch.zeros(1), f"v{i}": torch.zeros(1)}, str(tmp_path / f"{i}.safetensors"))
    index = {"weight_map": {"v1": "1.safetensors", "v2": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="2.safetensors holds w, and so does .*1.safetensors"):
        Checkpoint(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    write(tmp_path, {"w": torch.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors", "v": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks v"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": ["w"]}))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint(tmp_path)


def test_a_file_cut_while_open_is_noticed(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, {"w": torch.zeros(1000)}))
    os.truncate(tmp_path / "model-1.safetensors", 500)
    with pytest.raises(CheckpointError, match="ended while it was being read"):
        checkpoint.read("w", torch.float32)
    checkpoint.close()
