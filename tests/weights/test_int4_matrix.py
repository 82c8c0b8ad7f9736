"""INT4 checkpoints: codes and scales come out of the packed experts bit for bit, and what cannot is refused."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from int4 import EXPERTS, KINDS, LINEAR, draw, int4_checkpoint, values, words
from safetensors.torch import load_file, save_file

from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError
from hetero_glm5.weights.expert_source import CheckpointExperts, checkpoint_layout, expert_names, pack, read_expert
from hetero_glm5.weights.int4_matrix import Int4Matrix
from hetero_glm5.weights.names import expected_tensors
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

CASES = [(kind, group, torch.float16 if kind != KINDS[0] or group == 64 else torch.bfloat16)
         for kind in KINDS for group in (32, 64, 128)]  # fmt: skip


def experts_of(folder, method="INT4"):
    checkpoint = Checkpoint(folder)
    config = ModelConfig.load(folder)
    known = expected_tensors(config, mtp=True)
    checkpoint.check(known, known)
    return checkpoint, CheckpointExperts(checkpoint, checkpoint_layout(checkpoint, config, method))


@pytest.mark.parametrize(("kind", "group", "dtype"), CASES)
def test_codes_and_scales_come_out_bit_for_bit(checkpoints, kind, group, dtype):
    _, source = experts_of(int4_checkpoint(checkpoints, kind, group, dtype))
    assert (source.layout.group, source.layout.book) == (group, "linear")
    packed = PackedExperts(source.layout, 16)
    for expert in (0, 15):
        packed.blob(expert).fill_(255)
        source.place(packed, 3, expert)
        unpacked = source.layout.unpack(packed.blob(expert), torch.float32)
        weights = zip(expert_names(3, expert), packed.dequantize(expert), unpacked, strict=True)
        for name, stored, again in weights:
            codes, scales = draw(name, tuple(stored.shape), group, dtype)
            spread = scales.float().repeat_interleave(group, 1)
            assert torch.equal(stored / spread + 8, codes.float()) and torch.equal(stored, again)
            ones = torch.where(codes == 9, stored, 0).view(len(stored), -1, group)
            found = ones.gather(2, ones.abs().argmax(2, keepdim=True))[..., 0]
            assert torch.equal(found, scales.float() * (found != 0)) and (found != 0).float().mean() > 0.8
    if dtype == torch.float16:  # whose lowest bits choose among the books
        assert (scales.view(torch.int16) & 3).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["FP32", "BF16", "INT8"])
def test_other_methods_pack_the_dequantised_weights(checkpoints, kind, method):
    folder = int4_checkpoint(checkpoints, kind)
    _, source = experts_of(folder, method)
    _, plain = experts_of(folder.with_name(f"{folder.name}-plain"), method)
    got, want = torch.empty(2, source.layout.blob_bytes, dtype=torch.uint8)
    source.fill(got.fill_(255), 2, 7)
    plain.fill(want, 2, 7)
    assert torch.equal(got, want)


def test_fp8_is_refused(checkpoints):
    _, source = experts_of(int4_checkpoint(checkpoints, KINDS[0]), "FP8")
    with pytest.raises(CheckpointError, match="expert 7 of layer 2 is not FP8"):
        source.fill(torch.empty(source.layout.blob_bytes, dtype=torch.uint8), 2, 7)


def test_what_the_layout_of_a_checkpoint_is(checkpoints):
    config = ModelConfig.load(folder := int4_checkpoint(checkpoints, "gptq", 64, torch.float16))
    checkpoint, plain = Checkpoint(folder), Checkpoint(folder.with_name(f"{folder.name}-plain"))
    for source, method, group, book, want in [
        (checkpoint, "INT4", 0, "", (64, "linear")),
        (checkpoint, "INT4", 64, "", (64, "linear")),
        (checkpoint, "INT4", 0, "gaussian", (64, "gaussian")),
        (checkpoint, "INT4", 32, "", (32, "gaussian")),  # not theirs, so quantised anew
        (checkpoint, "INT8", 0, "", (128, "")),
        (checkpoint, "BF16", 0, "", (0, "")),
        (plain, "INT4", 0, "", (128, "gaussian")),
        (plain, "INT4", 128, "linear", (128, "linear")),
    ]:
        layout = checkpoint_layout(source, config, method, group, book)
        assert (layout.method, layout.group, layout.book) == (method, *want)
    plain.int4 = checkpoint.int4  # INT4 is in its dense layers only
    assert checkpoint_layout(plain, config, "INT4").book == "gaussian"


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_are_dequantised_on_load(checkpoints, kind):
    folder = int4_checkpoint(checkpoints, kind, dense=True)
    (checkpoint, _), plain = experts_of(folder), Checkpoint(folder.with_name(f"{folder.name}-plain"))
    dense = [name for name in plain.entries if EXPERTS not in name and name.endswith(LINEAR)]
    assert len(dense) == 6 * 11 + 1 and all(checkpoint.method(name) == "INT4" for name in dense)
    assert checkpoint.method("lm_head.weight") == checkpoint.method("nowhere.weight") == ""
    for name in dense:
        want = plain.read(name, torch.float32)
        assert torch.equal(checkpoint.read(name, torch.float32), want)
        assert torch.equal(checkpoint.read(name, torch.bfloat16), want.bfloat16())


@pytest.mark.parametrize(("hidden", "intermediate", "group"), [(130, 17, 32), (200, 130, 64), (129, 333, 128)])
def test_ragged_edges(hidden, intermediate, group):
    """Columns that fill no word and no group, rows that fill no tile: what lies beyond them reaches no result."""
    layout = ExpertLayout("INT4", hidden, intermediate, group, "linear")
    shapes = ((intermediate, hidden),) * 2 + ((hidden, intermediate),)
    drawn = [draw(f"{i}", shape, group, torch.float16) for i, shape in enumerate(shapes)]
    matrices = [Int4Matrix(words(codes).view(torch.uint8), scales, codes.shape[1], group) for codes, scales in drawn]
    want = [values(codes, scales, group) for codes, scales in drawn]
    packed = PackedExperts(layout, 1)
    packed.blob(0).fill_(255)
    pack(layout, packed.blob(0), (*matrices, None), "it")
    for matrix, stored, exact in zip(matrices, packed.dequantize(0), want, strict=True):
        assert matrix.shape == exact.shape and torch.equal(matrix[:], exact) and torch.equal(matrix[3:9], exact[3:9])
        assert torch.equal(stored, exact)
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    y = CpuExperts(packed, threads=1)(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    exact = (F.silu(x @ want[0].T) * (x @ want[1].T)) @ want[2].T
    assert (y - exact).norm() / exact.norm() < 0.03  # activations are rounded to 8 bits


def test_codes_are_packed_under_the_linear_books_only():
    blob = torch.empty(1 << 20, dtype=torch.uint8)
    codes, scales = [torch.zeros(64, 32, dtype=torch.uint8)] * 3, [torch.ones(64, 2).half()] * 3
    for method, group, what in (("INT4", 32, "INT4 in gaussian"), ("INT8", 32, "INT8")):
        layout = ExpertLayout(method, 64, 64, group)
        with pytest.raises(ValueError, match=f"codes of {what} cannot be packed as they are"):
            layout.pack_codes_into(blob[: layout.blob_bytes], codes, scales)
    layout = ExpertLayout("INT4", 64, 64, 32, "linear")
    for wrong in ((codes, [torch.ones(64, 1).half()] * 3), ([torch.zeros(64, 28, dtype=torch.uint8)] * 3, scales)):
        with pytest.raises(ValueError, match=r"gate (codes|scales) has shape"):
            layout.pack_codes_into(blob[: layout.blob_bytes], *wrong)


def altered(folder, out, change):
    """A copy whose tensors and quantization_config `change(tensors, config)` has altered."""
    shutil.copytree(folder, out)
    tensors, config = load_file(str(out / "model.safetensors")), json.loads((out / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, str(out / "model.safetensors"))
    (out / "config.json").write_text(json.dumps(config))
    return out


NAME = "model.layers.2.mlp.experts.1.up_proj."


def refusal(folder, tmp_path, change, round_scales=False):
    checkpoint, source = experts_of(altered(folder, tmp_path / "altered", change))
    blob = torch.empty(source.layout.blob_bytes, dtype=torch.uint8)
    with pytest.raises(CheckpointError) as error:
        pack(source.layout, blob, read_expert(checkpoint, 2, 1), "expert 1 of layer 2", round_scales)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(("kind", "zero"), [("gptq", 7), ("gptq_v2", 8)])
def test_a_zero_outside_the_middle_is_refused(checkpoints, tmp_path, kind, zero):
    """Also 8 in the first version, where it means 9."""

    def shift(tensors, config):
        tensors[NAME + "qzeros"][1, 2] += 1 << 20

    message = refusal(int4_checkpoint(checkpoints, kind), tmp_path, shift)
    assert f"{NAME}qzeros holds {zero + 1} where only {zero} can be read" in message and "symmetric" in message


def test_a_mislabelled_version_is_refused(checkpoints, tmp_path):
    message = refusal(
        int4_checkpoint(checkpoints, "gptq_v2"), tmp_path, lambda _, config: config.update(checkpoint_format="gptq")
    )
    assert "qzeros holds 8 where only 7" in message


def test_an_order_of_columns_is_refused_and_a_trivial_one_is_not(checkpoints, tmp_path):
    def swap(tensors, config):
        config["desc_act"] = True
        tensors[NAME + "g_idx"][[0, 40]] = torch.tensor([1, 0], dtype=torch.int32)

    folder = int4_checkpoint(checkpoints, "gptq")
    message = refusal(folder, tmp_path, swap)
    assert f"{NAME}g_idx puts columns in an order" in message and "desc_act" in message
    trivial = altered(folder, tmp_path / "trivial", lambda _, config: config.update(desc_act=True))
    checkpoint, source = experts_of(trivial)
    source.fill(torch.empty(source.layout.blob_bytes, dtype=torch.uint8), 2, 1)

    def without(tensors, config):
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    checkpoint, _ = experts_of(altered(folder, tmp_path / "without", without))
    assert isinstance(read_expert(checkpoint, 2, 1)[1], Int4Matrix)
    with pytest.raises(CheckpointError, match="missing: .*g_idx"):
        experts_of(altered(trivial, tmp_path / "both", without))


@pytest.mark.parametrize(
    ("value", "rounds", "told"),
    [
        (0.1, True, "exactly"),
        (2.0**-26, True, "exactly"),
        (1e6, False, "at all; its largest"),
        (math.nan, False, "at"),
        (math.inf, False, "at all"),
    ],
)
def test_scales_that_fp16_cannot_hold(checkpoints, tmp_path, value, rounds, told):
    """Serving refuses them; packing a store rounds what can be rounded, and reports the error."""

    def change(tensors, config):
        tensors[NAME + "weight_scale"] = tensors[NAME + "weight_scale"].float()
        tensors[NAME + "weight_scale"][5, 1] = value

    folder = int4_checkpoint(checkpoints, KINDS[0])
    message = refusal(folder, tmp_path, change)
    for part in ("up_proj of expert 1 of layer 2 has a scale of ", told, "--kt-method BF16"):
        assert part in message
    if not rounds:
        shutil.rmtree(tmp_path / "altered")
        assert "hetero-glm5 quantize" not in refusal(folder, tmp_path, change, round_scales=True)
        return
    assert "hetero-glm5 quantize, which rounds" in message
    checkpoint, source = experts_of(tmp_path / "altered")
    packed = PackedExperts(source.layout, 1)
    raw = read_expert(checkpoint, 2, 1)
    pack(source.layout, packed.blob(0), raw, "it", round_scales=True)
    wrong = packed.dequantize(0)[1] != raw[1][:]
    codes, _ = draw(NAME + "weight", (128, 256), 32, torch.bfloat16)
    expected = torch.zeros_like(wrong)
    expected[5, 32:64] = codes[5, 32:64] != 8
    assert torch.equal(wrong, expected)


def drop(*names):
    return lambda tensors, config: [tensors.pop(NAME + name) for name in names]


def regroup(tensors, config):
    config["config_groups"]["group_0"]["weights"]["group_size"] = 64


def both(tensors, config):
    tensors[NAME + "weight"] = torch.zeros(128, 256)


def zero_points(tensors, config):
    tensors[NAME + "weight_zero_point"] = torch.zeros(16, 8, dtype=torch.int32)


WRONG = {
    "a part": (drop("weight_scale"), f"1 missing: {NAME}weight_scale"),
    "the whole": (drop("weight_scale", "weight_packed", "weight_shape"), f"1 missing: {NAME}weight"),
    "another group": (regroup, "weight_scale has shape [128, 8], expected [128, 4]"),
    "both": (both, f"{NAME}weight is there and so is {NAME}weight_packed"),
    "zero points": (zero_points, f"1 unexpected: {NAME}weight_zero_point"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_told(checkpoints, tmp_path, case):
    change, told = WRONG[case]
    with pytest.raises(CheckpointError) as error:
        experts_of(altered(int4_checkpoint(checkpoints, KINDS[0]), tmp_path / "o", change))
    assert told in str(error.value)


@pytest.mark.parametrize("shape", [[256, 128], [128, 255]])  # the second needs as many words as the right one
def test_a_shape_that_is_not_the_models_is_refused(checkpoints, tmp_path, shape):
    def change(tensors, config):
        tensors[NAME + "weight_shape"] = torch.tensor(shape)

    message = refusal(int4_checkpoint(checkpoints, KINDS[0]), tmp_path, change)
    assert f"{NAME}weight_shape is {shape}, expected [128, 256]" in message


def test_an_expert_that_is_int4_in_part_is_refused(checkpoints, tmp_path):
    def half(tensors, config):
        drop("weight_scale", "weight_packed", "weight_shape")(tensors, config)
        both(tensors, config)

    checkpoint, _ = experts_of(altered(int4_checkpoint(checkpoints, KINDS[0]), tmp_path / "o", half))
    with pytest.raises(CheckpointError, match=r"experts\.1\.\* mixes INT4 and other types"):
        read_expert(checkpoint, 2, 1)
