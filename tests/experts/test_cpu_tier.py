"""The host MoE operator against float64, on every ISA this machine has."""

import pytest
import torch

from hetero_glm5 import _C
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts, host_array, pack_experts

ISAS = _C.isas()
NODE = _C.topology()[0]["id"]
EXPERTS, SLOTS = 6, 4
SHAPES = [(1, 1), (130, 17), (200, 136), (1100, 24), (24, 1100)]  # hidden, intermediate; K crosses pieces of 1024

# ||y - ref|| / ||ref|| of a row. The reference rounds where the format rounds (x and hidden to bf16), in float64: what
# is left is the rounding of fp32 sums (2^-24 per step), and a hidden value that falls on the other side of a bf16 tie:
# 2^-8, for about one value in a thousand. In the integer formats x and hidden are rounded to multiples of a block's
# scale: in INT8 a hidden value on the other side of a tie is off by 2^-16 of the block's greatest, in INT4 by 2^-8.
TOLERANCE = {"FP32": 4e-6, "BF16": 1e-3, "FP8": 1e-3, "INT8": 1e-4, "INT4": 3e-3}
INPUT_STEPS = {"INT8": (127, 32512), "INT4": (127, 127)}  # of x, of hidden: absmax of 128 values / scale


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The reference's small products take seconds when torch's threads compete for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(method: str, hidden: int, intermediate: int, group: int = 0) -> PackedExperts:
    """With columns so large and so small that integer formats scale them, in every expert others."""
    g = torch.Generator().manual_seed(1)
    gate, up = (torch.randn((EXPERTS, intermediate, hidden), generator=g) / hidden**0.5 for _ in range(2))
    down = torch.randn((EXPERTS, hidden, intermediate), generator=g) / intermediate**0.5
    for expert in range(EXPERTS):
        gate[expert, :, expert::37] *= 20
        up[expert, :, 9 + expert :: 41] *= 100
        for part in (gate, up):
            part[expert, :, 20 + expert :: 43] /= 10
        down[expert, :, expert::19] *= 10
    packed = pack_experts(gate, up, down, method, group=group)
    if packed.layout.group and min(hidden, intermediate) > 1:
        for expert in range(EXPERTS):
            inputs, columns = packed.layout.column_scales(packed.blob(expert))
            assert len(inputs.unique()) > 2 or hidden < 63
            assert len(inputs.unique()) > 1 and len(columns.unique()) > 1
    return packed


def call(tokens: int, hidden: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """x, ids, weights; a fifth of the ids is -1 and its weight NaN, and x lies between rows of NaN."""
    g = torch.Generator().manual_seed(100 * seed + tokens)
    x = torch.full((tokens + 2, hidden), torch.nan)
    x[1 : tokens + 1] = torch.randn((tokens, hidden), generator=g)
    ids = torch.randint(0, EXPERTS, (tokens, SLOTS), generator=g)  # duplicates within a token occur
    ids[torch.rand((tokens, SLOTS), generator=g) < 0.2] = -1
    mix = torch.rand((tokens, SLOTS), generator=g)
    mix[ids == -1] = torch.nan
    return x.to(dtype)[1 : tokens + 1], ids, mix


def in_blocks(x: torch.Tensor, steps: int) -> torch.Tensor:
    """float32 [T, K] -> what an integer format makes of it, per token and 128 columns."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = (blocks.abs().amax(2, keepdim=True) * (torch.ones(()) / steps)).clamp_min(2.0**-40)
    return ((blocks * (1 / scale)).round().double() * scale).flatten(1)[:, : x.shape[1]]


def reference(packed: PackedExperts, x, ids, mix) -> torch.Tensor:
    method = packed.layout.method

    def rounded(t, part=0):
        if method in INPUT_STEPS:
            return in_blocks(t, INPUT_STEPS[method][part])
        return t if method == "FP32" else t.to(torch.bfloat16)

    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in packed.resident:
        gate, up, down = (w.double() for w in packed.dequantize(expert))
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        inputs, columns = torch.ones(2, 1)
        if packed.layout.group:
            inputs, columns = packed.layout.column_scales(packed.blob(expert))
        rows = rounded(x[tokens] * inputs).double() / inputs
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        out = (rounded(hidden.float() * columns, 1).double() / columns) @ down.T
        y.index_add_(0, tokens, out * mix[tokens, slots, None].double())
    return y


def forward(experts: CpuExperts, x, ids, mix) -> torch.Tensor:
    """Into a poisoned output, after a call that left NaN in the scratch memory."""
    nan = torch.full_like(x, torch.nan)
    experts(nan, torch.zeros_like(ids), torch.zeros_like(mix))
    y = torch.full(x.shape, torch.nan)
    experts._c.forward(host_array("x", x), ids.numpy(), mix.numpy(), y.numpy())
    return y


def assert_close(method, y, ref):
    assert y.dtype == torch.float32 and not torch.isnan(y).any()
    error = (y.double() - ref).norm(dim=1) / ref.norm(dim=1).clamp_min(1e-30)
    assert error.numel() == 0 or error.max() < TOLERANCE[method], f"error {error.max():.2e}"


@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_against_float64(method, isa, hidden, intermediate):
    packed = weights(method, hidden, intermediate)
    experts = CpuExperts(packed, threads=2, isa=isa)
    assert experts.isa == isa
    for tokens in (0, 1, 2, 3, 8, 17, 33):
        for dtype in (torch.float32, torch.bfloat16):
            x, ids, mix = call(tokens, hidden, dtype=dtype)
            assert_close(method, forward(experts, x, ids, mix), reference(packed, x, ids, mix))


@pytest.mark.parametrize(
    "numbers", [(1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64), pytest.param((257,), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_rows_of_an_expert(method, isa, numbers):
    packed = weights(method, 130, 40)
    experts = CpuExperts(packed, threads=2, isa=isa)
    for rows in numbers:
        x, ids, mix = call(rows, 130)
        one = (torch.full_like(ids[:, :1], 2), mix[:, :1].nan_to_num(0.5))
        assert_close(method, forward(experts, x, *one), reference(packed, x, *one))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("method", "group"), [("INT8", 32), ("INT8", 64), ("INT4", 64), ("INT4", 128)])
def test_other_groups_against_float64(method, group, isa):
    packed = weights(method, 1100, 200, group)
    experts = CpuExperts(packed, threads=2, isa=isa)
    for tokens in (1, 12, 33):
        x, ids, mix = call(tokens, 1100)
        assert_close(method, forward(experts, x, ids, mix), reference(packed, x, ids, mix))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_depends_on_nothing_but_itself(method, isa):
    """Bit for bit: not on threads, batch mates, token blocks, panels, pieces of K, or where the row stands."""
    hidden, intermediate = 1100, 40
    packed = weights(method, hidden, intermediate)
    x, _, mix = call(300, hidden)
    ids = torch.randint(0, EXPERTS, (300, SLOTS), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 3  # one expert sees every row: several panels, and many token blocks
    mix = mix.nan_to_num(0.5)
    pools = [HostPool(threads, isa) for threads in (1, 2, 3)]
    whole = [CpuExperts(packed, pool=pool)(x, ids, mix) for pool in pools]
    assert torch.equal(whole[0], whole[1]) and torch.equal(whole[0], whole[2])
    experts = CpuExperts(packed, pool=pools[1])
    for rows in (1, 2, 5, 9, 12, 13, 14, 25, 129):
        assert torch.equal(experts(x[:rows], ids[:rows], mix[:rows]), whole[0][:rows]), f"{rows} rows"
    back = torch.arange(299, 199, -1)
    assert torch.equal(experts(x[back], ids[back], mix[back]), whole[0][back])


def divided(packed: PackedExperts, shards: int) -> PackedExperts:
    """A copy whose experts lie in that many shards, in memory that was full of NaN."""
    copy = PackedExperts(packed.layout, packed.num_experts, nodes=[NODE] * shards)
    for expert in range(packed.num_experts):
        with copy.filling(expert) as blob:
            blob.fill_(255)
        with copy.filling(expert) as blob:
            blob.copy_(packed.blob(expert))
        assert torch.equal(copy.read(expert), packed.blob(expert))
    return copy


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_shards_threads_and_their_groups_change_nothing(method, isa):
    """Bit for bit: ragged shards, empty ones, more groups than shards and fewer, more threads than tasks."""
    pools = [HostPool(n, isa, [NODE] * groups) for n in range(1, 5) for groups in range(min(n, 3) + 1)]
    for hidden, intermediate in ((1, 1), (130, 17), (200, 300), (1100, 40)):
        packed = weights(method, hidden, intermediate)
        calls = [call(tokens, hidden) for tokens in (1, 9)]
        expected = [forward(CpuExperts(packed, pool=pools[0]), *c) for c in calls]
        assert all(y.isfinite().all() and y.any() for y in expected)
        for shards in (1, 2, 3):
            copy = divided(packed, shards)
            for pool in pools:
                got = [forward(CpuExperts(copy, pool=pool), *c) for c in calls]
                assert all(map(torch.equal, got, expected)), f"{shards} shards, {pool.node_threads} threads"
    assert [pool.node_threads for pool in pools[-4:]] == [(4,), (4,), (2, 2), (2, 1, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_many_rows_in_shards(method):
    """Down tasks of many tiles, several panels."""
    packed = weights(method, 1100, 40)
    x, ids, mix = call(300, 1100)
    expected = CpuExperts(packed, 2)(x, ids, mix.nan_to_num(0.5))
    for shards in (2, 3):
        copy = divided(packed, shards)
        for threads in (2, 3):
            pool = HostPool(threads, nodes=[NODE] * 2)
            assert torch.equal(CpuExperts(copy, pool=pool)(x, ids, mix.nan_to_num(0.5)), expected)


def test_a_pool_on_unknown_nodes_is_refused():
    with pytest.raises(ValueError, match="no CPU of NUMA node 1000"):
        HostPool(2, nodes=[NODE, 1000])
    with pytest.raises(ValueError, match="at least 2 threads, one for each NUMA node, not 1"):
        HostPool(1, nodes=[NODE, NODE])


@pytest.mark.parametrize(("hidden", "intermediate"), [(130, 17), (1100, 40)])
@pytest.mark.parametrize("method", ["FP32", "INT8", "INT4"])
def test_the_same_bits_on_every_isa(method, hidden, intermediate):
    packed = weights(method, hidden, intermediate)
    x, ids, mix = call(33, hidden)
    x *= torch.logspace(-3, 3, 33)[:, None]  # SiLU from linear to saturated
    results = [forward(CpuExperts(packed, 2, isa), x, ids, mix) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        assert torch.equal(result, results[0]), isa


@pytest.mark.parametrize("isa", ISAS)
def test_every_e4m3_code_through_the_kernels(isa):
    """Unit vectors pick single weights: gate = 1, up and down = codes, so y is code * code of every non-NaN code."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()]
    n = codes.numel()
    up, gate = torch.zeros(n, n, dtype=torch.uint8), torch.zeros(n, n, dtype=torch.uint8)
    up.diagonal().copy_(codes.view(torch.uint8))
    gate[:, :] = torch.tensor(64.0).to(torch.float8_e4m3fn).view(torch.uint8)  # silu(64) = 64
    one = torch.ones(2, 2)
    parts = [p.view(torch.float8_e4m3fn)[None] for p in (gate, up, up)]
    packed = pack_experts(*parts, method="FP8", scales=(one[None],) * 3)
    experts = CpuExperts(packed, 2, isa)
    y = experts(torch.eye(n), torch.zeros(n, 1, dtype=torch.int32), torch.ones(n, 1))
    assert torch.equal(y.diagonal(), 64 * codes.float() ** 2)
    assert (y - y.diagonal().diag()).count_nonzero() == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_e4m3_nan_is_a_nan(isa, code):
    up = torch.zeros(1, 8, 8, dtype=torch.uint8)
    up[0, 5, 6] = code
    parts = [p.view(torch.float8_e4m3fn) for p in (torch.full_like(up, 0x38), up, torch.full_like(up, 0x38))]
    packed = pack_experts(*parts, method="FP8", scales=(torch.ones(1, 1, 1),) * 3)
    y = CpuExperts(packed, 2, isa)(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    assert torch.isnan(y).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", ["INT8", "INT4"])
def test_the_greatest_codes_do_not_overflow(method, isa):
    """Every weight and every input at the end of its range, in one sign: no 16-bit sum holds two products."""
    n, one = 256, torch.ones(1, 1, dtype=torch.int32)
    for sign in (1, -1):
        parts = [torch.full((1, n, n), sign * 4.0), torch.full((1, n, n), 4.0), torch.full((1, n, n), -4.0)]
        packed = pack_experts(*parts, method=method)
        x = torch.full((1, n), sign / 1024)  # gate is 1
        y = CpuExperts(packed, 2, isa)(x, one * 0, one.float())
        assert_close(method, y, reference(packed, x, one * 0, one.float()))


@pytest.mark.parametrize("method", ["INT8", "INT4"])
def test_blocks_of_very_different_size(method):
    """Scales of neighbouring blocks of x that are far apart: the running sum changes its unit at each of them."""
    packed = weights(method, 640, 24)
    x, ids, mix = call(5, 640)
    for row, powers in enumerate([(0, 9, -9, 3, 0), (-20, 6, 0, 0, 1), (5, -20, -20, -20, -20), (-30,) * 5]):
        x[row] *= (10.0 ** torch.tensor(powers)).repeat_interleave(128)
    x[4, :256] = x[4, 384:512] = 0
    y, ref = forward(CpuExperts(packed), x, ids, mix), reference(packed, x, ids, mix)
    assert_close(method, y[[0, 1, 2, 4]], ref[[0, 1, 2, 4]])
    assert (y[3].abs() < 1e-15).all()


# ||y - ref|| / ||ref|| of a layer on N(0, 0.02) weights and N(0, 1) inputs, ref from the original weights. The goals of
# the integer formats are Q8_0's 0.015 and Q4_K's 0.125.
LAYER_ERROR = {"BF16": 0.006, "FP8": 0.05, "INT8": 0.015, "INT4": 0.122}


@pytest.mark.parametrize("method", LAYER_ERROR)
def test_error_of_a_layer(method):
    hidden, intermediate, one = 6144, 256, torch.ones(16, 1)
    g = torch.Generator().manual_seed(3)
    gate, up = (0.02 * torch.randn((intermediate, hidden), generator=g) for _ in range(2))
    down, x = 0.02 * torch.randn((hidden, intermediate), generator=g), torch.randn((16, hidden), generator=g)
    packed = pack_experts(gate[None], up[None], down[None], method=method)
    y = CpuExperts(packed)(x, 0 * one.int(), one)
    ref = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert (y - ref).norm() / ref.norm() < LAYER_ERROR[method]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_stay_in_their_row(method, isa):
    packed = weights(method, 130, 17)
    x, ids, mix = call(33, 130)
    ids, mix = ids.clamp_min(0), mix.nan_to_num(0.5)
    experts = CpuExperts(packed, 2, isa)
    clean = experts(x, ids, mix)
    x = x.clone()
    x[4], x[20, 7] = torch.inf, torch.nan
    y = experts(x, ids, mix)
    others = [t for t in range(33) if t not in (4, 20)]
    assert torch.equal(y[others], clean[others])
    assert not torch.isfinite(y[4]).any() and torch.isnan(y[20]).all()


def test_inputs_of_every_kind():
    packed = weights("BF16", 130, 17)
    experts = CpuExperts(packed)
    x, ids, mix = call(8, 130, dtype=torch.bfloat16)
    y = experts(x, ids, mix)
    assert torch.equal(experts(x.float(), ids.int(), mix), y)
    ids[3] = -1
    assert torch.equal(experts(x, ids, mix)[3], torch.zeros(130))
    assert experts(x, ids[:, :0], mix[:, :0].contiguous()).count_nonzero() == 0


def test_threads_default_to_physical_cores():
    assert HostPool().threads == len(_C.physical_cores())
    assert HostPool().isa == _C.selected_isa()


def test_layers_share_a_pool():
    pool = HostPool(2)
    small, large = weights("FP32", 24, 17), weights("BF16", 200, 136)
    for packed in (small, large, small):
        x, ids, mix = call(9, packed.layout.hidden)
        method = packed.layout.method
        assert_close(method, CpuExperts(packed, pool=pool)(x, ids, mix), reference(packed, x, ids, mix))


def test_a_closed_pool_refuses():
    pool = HostPool(2)
    experts = CpuExperts(weights("BF16", 24, 17), pool=pool)
    assert experts(*call(3, 24)).shape == (3, 24)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        experts(*call(3, 24))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a["ids"].fill_(-2), r"token 0 asks for expert -2; ids are -1 \(not here\) to 5"),
        (lambda a: a["ids"][2].fill_(6), "token 2 asks for expert 6; ids are"),
        (lambda a: a["ids"][1].fill_(4), "token 1 asks for expert 4 of 6, which is not resident"),
        (lambda a: a.update(x=a["x"][:, :-1].contiguous()), r"x has shape \[3, 23\], must be \[3, 24\]"),
        (lambda a: a.update(x=a["x"][0]), r"of shape \[24\]"),
        (lambda a: a.update(x=a["x"].double()), "x is torch.float64"),
        (lambda a: a.update(x=torch.zeros(24, 3).T), "x is on cpu with strides"),
        (lambda a: a.update(ids=a["ids"][:2]), r"topk_ids has shape \[2, 4\], must be \[3, \*\]"),
        (lambda a: a.update(ids=a["ids"].short()), "topk_ids holds elements of type int16, must be int32"),
        (lambda a: a.update(mix=a["mix"][:, :3].contiguous()), r"topk_weights has shape \[3, 3\], must be \[3, 4\]"),
        (lambda a: a.update(mix=a["mix"].double()), "topk_weights holds elements of type float64"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    packed = PackedExperts(ExpertLayout("BF16", 24, 17), EXPERTS, resident=[0, 1, 2, 3, 5])
    x, ids, mix = call(3, 24)
    arguments = {"x": x, "ids": ids.clamp_min(0) % 4, "mix": mix.nan_to_num(0.5)}
    change(arguments)
    experts = CpuExperts(packed)
    with pytest.raises(ValueError, match=sentence):
        experts(arguments["x"], arguments["ids"], arguments["mix"])
    assert experts(x, ids.clamp_min(0) % 4, mix).shape == (3, 24)


@pytest.mark.parametrize("x", [torch.zeros(2, 8, dtype=torch.int16), torch.zeros(2, 8).half(), torch.zeros(8)])
def test_only_float32_and_bfloat16_rows_are_taken(x):
    experts = CpuExperts(pack_experts(torch.ones(1, 8, 8), torch.ones(1, 8, 8), torch.ones(1, 8, 8), "FP32"))
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        experts(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    experts.pool.close()
