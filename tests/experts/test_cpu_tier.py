"""The host MoE operator against float64, on every ISA this machine has."""

import gc

import pytest
import torch

from hetero_glm5 import _C
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts, host_array, pack_experts

ISAS = _C.isas()
EXPERTS, SLOTS = 6, 4
SHAPES = [(1, 1), (130, 17), (200, 136), (1100, 24), (24, 1100)]  # hidden, intermediate; K crosses pieces of 1024

# ||y - ref|| / ||ref|| of a row. The reference rounds where the format rounds (x and hidden to bf16), in float64: what
# is left is the rounding of fp32 sums (2^-24 per step), and a hidden value that falls on the other side of a bf16 tie:
# 2^-8, for about one value in a thousand.
TOLERANCE = {"FP32": 4e-6, "BF16": 6e-4, "FP8": 6e-4}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The reference's small products take seconds when torch's threads compete for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(method: str, hidden: int, intermediate: int) -> PackedExperts:
    g = torch.Generator().manual_seed(1)
    gate, up = (torch.randn((EXPERTS, intermediate, hidden), generator=g) / hidden**0.5 for _ in range(2))
    down = torch.randn((EXPERTS, hidden, intermediate), generator=g) / intermediate**0.5
    return pack_experts(gate, up, down, method)


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


def reference(packed: PackedExperts, x, ids, mix) -> torch.Tensor:
    def rounded(t):
        return t if packed.layout.method == "FP32" else t.to(torch.bfloat16)

    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in packed.resident:
        gate, up, down = (w.double() for w in packed.dequantize(expert))
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        rows = rounded(x[tokens]).double()
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        out = rounded(hidden.float()).double() @ down.T
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


@pytest.mark.parametrize(("hidden", "intermediate"), [(130, 17), (1100, 40)])
def test_fp32_gives_the_same_bits_on_every_isa(hidden, intermediate):
    packed = weights("FP32", hidden, intermediate)
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


def test_submit_runs_in_order_and_keeps_its_inputs():
    packed = weights("BF16", 200, 136)
    experts = CpuExperts(packed)
    tickets = [experts.submit(*call(8, 200, seed=seed)) for seed in range(10)]  # the inputs live in the ticket only
    gc.collect()
    for seed, ticket in enumerate(tickets):
        assert torch.equal(ticket.wait(), experts(*call(8, 200, seed=seed)))
        assert ticket.wait() is ticket.wait()


def test_an_error_in_a_submitted_call_comes_out_at_wait():
    experts = CpuExperts(weights("BF16", 24, 17))
    x, ids, mix = call(3, 24)
    ids[2, 1] = EXPERTS
    ticket = experts.submit(x, ids, mix)
    for _ in range(2):
        with pytest.raises(ValueError, match="token 2 asks for expert 6"):
            ticket.wait()
    experts.submit(*call(3, 24)).wait()


def test_dropped_tickets_free_their_slots():
    experts = CpuExperts(weights("BF16", 24, 17))
    for seed in range(200):
        experts.submit(*call(3, 24, seed=seed))


def test_a_closed_pool_refuses():
    pool = HostPool(2)
    experts = CpuExperts(weights("BF16", 24, 17), pool=pool)
    ticket = experts.submit(*call(3, 24))
    pool.close()
    pool.close()
    assert ticket.wait().shape == (3, 24)
    with pytest.raises(ValueError, match="closed"):
        experts(*call(3, 24))
    with pytest.raises(ValueError, match="closed"):
        experts.submit(*call(3, 24))


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
    packed = PackedExperts.allocate(ExpertLayout("BF16", 24, 17), EXPERTS, resident=[0, 1, 2, 3, 5])
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
