"""Packing, unpacking and the scalar truth, against torch."""

import math
import zlib

import pytest
import torch

from hetero_glm5 import _C
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts, pack_experts, quantize_fp8

SHAPES = [(1, 1), (16, 16), (130, 17), (200, 136), (256, 128), (384, 300)]  # hidden, intermediate
DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16}
NODE = _C.topology()[0]["id"]
SOURCES = [torch.float32, torch.bfloat16, torch.float16]


def expert(hidden: int, intermediate: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def fp8_expert(hidden: int, intermediate: int, seed: int = 0):
    """Random codes, every code but NaN among them (subnormals too), and random scales."""
    g = torch.Generator().manual_seed(seed)
    codes, scales = [], []
    for weight in expert(hidden, intermediate):
        code = torch.randint(0, 254, weight.shape, generator=g, dtype=torch.uint8)
        code += code >= 127  # skip 0x7f; 0xff is out of range
        codes.append(code.view(torch.float8_e4m3fn))
        blocks = [math.ceil(n / 128) for n in weight.shape]
        scales.append(torch.rand(blocks, generator=g) + 0.01)
    return tuple(codes), tuple(scales)


def dequantized(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return code.float() * spread[: code.shape[0], : code.shape[1]]


def poisoned(layout: ExpertLayout) -> torch.Tensor:
    return torch.full((layout.blob_bytes,), 0xFF, dtype=torch.uint8)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_methods():
    assert METHODS == ("FP32", "BF16", "FP8", "INT8", "INT4")
    with pytest.raises(ValueError, match="'INT9' is not one of FP32, BF16, FP8, INT8, INT4"):
        ExpertLayout("INT9", 16, 16)


@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", DTYPES)
def test_float_round_trip(method, source, hidden, intermediate):
    layout = ExpertLayout(method, hidden, intermediate)
    weights = [w.to(source) for w in expert(hidden, intermediate)]
    packed = PackedExperts(layout, 1)
    packed.blob(0).fill_(0xFF)
    packed.set(0, *weights)
    want = [w.float().to(DTYPES[method]) for w in weights]
    assert_same(layout.unpack(packed.blob(0), DTYPES[method]), want)
    assert_same(packed.dequantize(0), [w.float() for w in want])


@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
@pytest.mark.parametrize("method", ["FP32", "BF16", "FP8"])
def test_e4m3_sources(method, hidden, intermediate):
    codes, scales = fp8_expert(hidden, intermediate)
    layout = ExpertLayout(method, hidden, intermediate)
    packed = PackedExperts(layout, 1)
    packed.set(0, *codes, scales=scales)
    dtype = DTYPES.get(method, torch.float32)
    want = [dequantized(c, s).to(dtype).float() for c, s in zip(codes, scales, strict=True)]
    assert_same(packed.dequantize(0), want)
    assert_same([w.float() for w in layout.unpack(packed.blob(0), dtype)], want)


def test_fp8_is_bit_exact_for_every_code():
    every = torch.arange(256, dtype=torch.uint8)
    code = every.repeat(256, 1).view(torch.float8_e4m3fn)
    layout = ExpertLayout("FP8", 256, 256)
    packed = PackedExperts(layout, 1)
    packed.set(0, code, code, code, scales=(torch.ones(2, 2),) * 3)
    for got in packed.dequantize(0):
        assert torch.equal(torch.isnan(got), torch.isnan(code.float()))
        finite = ~torch.isnan(got)
        assert torch.equal(got[finite].view(torch.int32), code.float()[finite].view(torch.int32))


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_zero_and_packing_is_complete(method):
    """Two different poisons under the same weights give the same bytes: every byte of the blob is written."""
    layout = ExpertLayout(method, 130, 17)
    codes, scales = fp8_expert(130, 17)
    ones, zeros = poisoned(layout), torch.zeros_like(poisoned(layout))
    for blob in (ones, zeros):
        layout.pack_into(blob, *codes, scales=scales)
    assert torch.equal(ones, zeros)


@pytest.mark.parametrize("method", METHODS)
def test_layout_sizes(method):
    layout = ExpertLayout(method, 6144, 2048)
    bits = {"FP32": 32, "BF16": 16, "FP8": 8, "INT8": 8.125, "INT4": 4.375}[method]
    assert layout.blob_bytes % _C.BLOB_ALIGN == 0
    assert bits <= layout.bits_per_weight < bits * 1.04
    assert layout.version == _C.LAYOUT_VERSION
    assert layout == ExpertLayout(method, 6144, 2048, layout.group, layout.book)


# CRC-32 of one packed expert. Who changes what a store holds raises kLayoutVersion (csrc/format/format.h).
BYTES = {3: {"FP32": 3427841877, "BF16": 231963718, "FP8": 486566360, "INT8": 137339774, "INT4": 3959049834}}


@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_this_layout_version(method):
    hidden, intermediate = 200, 136
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    parts = [((torch.arange(n * k) * 37 % 101 - 50) / 64).view(1, n, k) for n, k in shapes]
    blob = pack_experts(*parts, method=method).blob(0)
    assert zlib.crc32(blob.numpy().data) == BYTES[_C.LAYOUT_VERSION][method]


def test_gate_and_up_tiles_alternate():
    layout = ExpertLayout("BF16", 2, 64)
    blob = poisoned(layout)
    layout.pack_into(blob, torch.full((64, 2), 1.0), torch.full((64, 2), 2.0), torch.full((2, 64), 3.0))
    values = blob.view(torch.bfloat16).float()
    assert values[:256].view(4, 64).unique(dim=1).tolist() == [[1], [2], [1], [2]]
    assert values[256:320].tolist() == [3.0] * 4 + [0.0] * 60  # K pair 0 of 2 rows, 30 rows of padding


def test_quantize_fp8_against_its_definition():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weight[128:, 256:] = 0  # a block of zeros
    codes, scales = quantize_fp8(weight)
    assert scales.shape == (2, 3)
    assert scales[0, 1] == weight[:128, 128:256].abs().max() / 448
    back = dequantized(codes, scales)
    bound = torch.maximum(weight.abs() * 2**-4, scales.max() * 2**-10)  # half a step of 3 mantissa bits; of a subnormal
    assert ((back - weight).abs() <= bound).all()


@pytest.mark.parametrize("method", METHODS)
def test_pack_experts(method):
    parts = [torch.stack(p) for p in zip(expert(130, 17, 0), expert(130, 17, 1), strict=True)]
    packed = pack_experts(*parts, method=method)
    assert packed.num_experts == 2 and packed.resident == (0, 1)
    assert packed.bits_per_weight == packed.layout.bits_per_weight
    error = {"FP32": 0, "BF16": 2**-8, "FP8": 2**-4, "INT8": 0.008, "INT4": 0.07}[method]
    for e in range(2):
        for got, want in zip(packed.dequantize(e), [p[e] for p in parts], strict=True):
            assert (got - want).norm() <= error * want.norm()


def test_pack_experts_keeps_a_checkpoints_codes():
    codes, scales = fp8_expert(130, 200)
    packed = pack_experts(*[c[None] for c in codes], method="FP8", scales=tuple(s[None] for s in scales))
    assert_same(packed.dequantize(0), [dequantized(c, s) for c, s in zip(codes, scales, strict=True)])


def test_residency():
    packed = PackedExperts(ExpertLayout("BF16", 16, 16), 8, resident=[6, 1])
    assert packed.resident == (1, 6)
    packed.set(6, *expert(16, 16))
    with pytest.raises(KeyError, match="expert 2 is not resident: 2 of 8"):
        packed.blob(2)
    for resident, sentence in (([8], "expert 8 is outside 0..7"), ([1, 1], "expert 1 is listed as resident twice")):
        with pytest.raises(ValueError, match=sentence):
            PackedExperts(packed.layout, 8, resident)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (130, 17), (200, 300)])
def test_divided_experts_hold_the_same(method, hidden, intermediate):
    layout = ExpertLayout(method, hidden, intermediate)
    whole = PackedExperts(layout, 4, resident=[3, 1])
    rng = torch.Generator().manual_seed(5)
    for shards in (1, 2, 3, 50):
        packed = PackedExperts(layout, 4, resident=[3, 1], nodes=[NODE] * shards)
        assert packed.divided == (shards > 1) and packed.weights.shards == shards
        for e in (1, 3):
            blob = torch.randint(0, 256, (layout.blob_bytes,), generator=rng, dtype=torch.uint8)
            blob[layout._c.scales_offset + layout._c.scales_bytes :] = 0
            for experts in (whole, packed):
                with experts.filling(e) as target:
                    target.copy_(blob)
            assert torch.equal(packed.read(e), blob) and torch.equal(whole.read(e), blob)
        for e in (1, 3):  # neither expert has touched the other
            for got, want in zip(packed.dequantize(e), whole.dequantize(e), strict=True):
                assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_a_divided_expert_is_filled_whole_or_not_at_all():
    packed = PackedExperts(ExpertLayout("BF16", 40, 40), 4, [0, 1], nodes=[NODE] * 2)
    packed.set(0, *expert(40, 40))
    before = packed.read(0)
    with pytest.raises(RuntimeError), packed.filling(0) as blob:
        blob.fill_(1)
        raise RuntimeError
    assert before.any() and torch.equal(packed.read(0), before)
    with pytest.raises(ValueError, match="divided over 2 NUMA nodes is no single piece"):
        packed.blob(0)
    for use in (packed.read, packed.blob, lambda e: packed.set(e, *expert(40, 40))):
        with pytest.raises(KeyError, match="expert 2 is not resident: 2 of 4"):
            use(2)
    with pytest.raises(ValueError, match="not resident here"):
        packed.weights.read(2, before.numpy())
    with pytest.raises(ValueError, match="blob has shape"):
        packed.weights.write(0, before[1:].numpy())


def test_a_blob_outlives_its_owner():
    packed = PackedExperts(ExpertLayout("BF16", 16, 16), 1)
    blob = packed.blob(0)
    blob.fill_(5)
    del packed
    assert (blob == 5).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(gate=a["gate"][:-1]), r"gate has shape \[16, 130\], must be \[17, 130\]"),
        (lambda a: a.update(down=a["gate"]), r"down has shape \[17, 130\], must be \[130, 17\]"),
        (lambda a: a.update(up=a["up"][0]), r"up has shape \[130\]"),
        (lambda a: a.update(up=torch.zeros(130, 17).T), "up is on cpu with strides"),
        (lambda a: a.update(gate=a["gate"].to(torch.int32)), "dtype int32 cannot be packed"),
        (lambda a: a.update(gate=a["gate"].to(torch.float8_e4m3fn)), "need their fp32 block scales"),
        (lambda a: a.update(scales=(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 1))), "other dtypes have none"),
        (lambda a: a.update(blob=a["blob"][:-1]), r"blob has shape \[\d+\], must be"),
        (lambda a: a.update(blob=a["blob"].view(torch.int8)), "blob holds elements of type int8"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    layout = ExpertLayout("BF16", 130, 17)
    arguments = dict(zip(("gate", "up", "down"), expert(130, 17), strict=True), blob=poisoned(layout))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        layout.pack_into(**arguments)


def test_fp8_refuses_what_it_would_have_to_quantise_and_wrong_scales():
    layout = ExpertLayout("FP8", 130, 17)
    with pytest.raises(ValueError, match="quantise the others first"):
        layout.pack_into(poisoned(layout), *expert(130, 17))
    codes, scales = fp8_expert(130, 17)
    with pytest.raises(ValueError, match=r"gate scales has shape \[2, 1\], must be \[1, 2\]"):
        layout.pack_into(poisoned(layout), *codes, scales=(scales[2], scales[1], scales[2]))
    with pytest.raises(ValueError, match="hidden is 0"):
        ExpertLayout("FP8", 0, 16)
