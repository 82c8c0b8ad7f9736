"""INT8 and INT4: the quantiser in torch and in C++ (every ISA), what is stored, and how far it is from the weights."""

import pytest
import torch

from hetero_glm5 import _C
from hetero_glm5.weights.integers import column_scales, quantize_int4, quantize_int8
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts, pack_experts

INTEGERS = ("INT8", "INT4")
GROUPS = (32, 64, 128)
SHAPES = [(1, 1), (130, 17), (200, 136)]  # hidden, intermediate

# ||W' - W|| / ||W|| on Gaussian weights. INT8: absmax / 127 of n values. INT4: csrc/format/int4.h.
WEIGHT_ERROR = {("INT8", 32): 0.0055, ("INT8", 64): 0.0061, ("INT8", 128): 0.0067}
WEIGHT_ERROR |= {("INT4", 32): 0.0630, ("INT4", 64): 0.0645, ("INT4", 128): 0.0672}
# How many times that it is, of all other columns, where 0.5 % of the columns are 20 times as large. Without column
# scales it is 2.9 to 5.1 times in INT8 and 2.1 to 3.5 times in INT4, the more the larger the groups.
OUTLIERS_COST = {"INT8": 1.6, "INT4": 1.3}


@pytest.fixture(params=_C.isas())
def isa(request, monkeypatch):
    """Packing runs the selected ISA's quantiser."""
    monkeypatch.setenv("HETERO_GLM5_ISA", request.param)
    assert _C.selected_isa() == request.param
    return request.param


def gaussian(hidden: int, intermediate: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return [0.02 * torch.randn(shape, generator=g) for shape in shapes]


def awkward(hidden: int, intermediate: int) -> list[torch.Tensor]:
    """Groups of zeros, of one value, of tiny and of huge ones (no fp16 scale reaches them), and of equal extremes."""
    weights = gaussian(hidden, intermediate)
    for w in weights:
        w[::7] = 0
        w[1::7, : w.shape[1] // 2] = 0
        w[2::7] = -0.25
        w[3::7] *= 1e-9
        w[4::7] *= 1e9
        w[5::7] = w[5::7].sign()
    return weights


def with_outliers(hidden: int, intermediate: int) -> list[torch.Tensor]:
    """Large, small and absent columns, in gate and in up apart; large and absent rows, whose hidden values are too."""
    gate, up, down = weights = gaussian(hidden, intermediate)
    for n, w in enumerate(weights):
        columns = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(n))
        for column, factor in zip(columns, (20, 100, 1e-3, 1e9, 0, -40), strict=False):
            w[:, column] *= factor
    up[intermediate // 2] *= 50
    up[intermediate // 3] *= 0
    gate[intermediate // 4] *= 20
    down[:, intermediate // 5] /= 30
    return weights


def outlier_columns(hidden: int, intermediate: int, factor: float = 20) -> list[torch.Tensor]:
    """0.5 % of each matrix's columns are that many times as large."""
    weights = gaussian(hidden, intermediate)
    for n, w in enumerate(weights):
        columns = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(n))
        w[:, columns[: max(1, w.shape[1] // 200)]] *= factor
    return weights


def packed(layout: ExpertLayout, weights) -> PackedExperts:
    experts = PackedExperts(layout, 1)
    experts.blob(0).fill_(0xFF)
    experts.set(0, *weights)
    return experts


def expected(layout: ExpertLayout, gate, up, down) -> list[torch.Tensor]:
    """The three matrices by the quantiser in torch."""
    inputs, hidden = column_scales(gate, up, down)
    scales = (inputs, inputs / hidden[:, None], hidden)
    return [quantized(layout, w / scale) * scale for w, scale in zip((gate, up, down), scales, strict=True)]


def quantized(layout: ExpertLayout, weight: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] by the quantiser in torch."""
    if layout.method == "INT8":
        codes, scales = quantize_int8(weight, layout.group)
        values = codes.float() - 128
    else:
        books = layout._c.books if layout.book == "gaussian" else layout._c.books[:16]
        codes, scales, choices = quantize_int4(weight, layout.group, books)
        book = choices.long().repeat_interleave(8, 1)[:, : weight.shape[1]]
        values = torch.tensor(books).view(-1, 16)[book, codes.long()].float()
    return values * scales.float().repeat_interleave(layout.group, 1)[:, : weight.shape[1]]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("make", [awkward, with_outliers])
@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("method", INTEGERS)
def test_packing_is_the_quantiser_in_torch(isa, method, group, hidden, intermediate, make):
    layout = ExpertLayout(method, hidden, intermediate, group)
    weights = make(hidden, intermediate)
    experts = packed(layout, weights)
    want = expected(layout, *weights)
    assert_same(layout.column_scales(experts.blob(0)), column_scales(*weights))
    assert_same(experts.dequantize(0), want)
    assert_same(layout.unpack(experts.blob(0), torch.float32), want)
    assert_same(layout.unpack(experts.blob(0), torch.bfloat16), [w.bfloat16() for w in want])


@pytest.mark.parametrize("method", INTEGERS)
def test_sources_of_every_kind(isa, method):
    layout = ExpertLayout(method, 130, 200)
    for dtype in (torch.bfloat16, torch.float16):
        weights = [w.to(dtype) for w in gaussian(130, 200)]
        assert torch.equal(packed(layout, weights).blob(0), packed(layout, [w.float() for w in weights]).blob(0))
    codes = [(400 * w).to(torch.float8_e4m3fn) for w in gaussian(130, 200)]
    scales = [torch.rand(-(-c.shape[0] // 128), -(-c.shape[1] // 128)) + 0.01 for c in codes]
    experts = PackedExperts(layout, 1)
    experts.set(0, *codes, scales=tuple(scales))
    spread = [s.repeat_interleave(128, 0).repeat_interleave(128, 1) for s in scales]
    weights = [c.float() * s[: c.shape[0], : c.shape[1]] for c, s in zip(codes, spread, strict=True)]
    assert torch.equal(experts.blob(0), packed(layout, weights).blob(0))


@pytest.mark.parametrize(("method", "group"), WEIGHT_ERROR)
def test_error_of_gaussian_weights(method, group):
    weights = gaussian(1024, 256)
    stored = packed(ExpertLayout(method, 1024, 256, group), weights).dequantize(0)
    for got, want in zip(stored, weights, strict=True):
        error = ((got - want).norm() / want.norm()).item()
        assert 0.9 * WEIGHT_ERROR[method, group] < error < WEIGHT_ERROR[method, group]


def test_column_scales():
    """Half of the difference to the median, in powers of two; none for plain weights."""
    factors = torch.tensor([1.5, 4, 64, 1 / 16, 1e9, 0])
    want = [1, 2, 8, 0.25, 64, 1]

    gate, up, down = gaussian(640, 256)
    assert all((scales == 1).all() for scales in column_scales(gate, up, down))
    gate[:, :6] *= factors
    up[:, :6] *= factors
    inputs, _ = column_scales(gate, up, down)
    assert inputs[:6].tolist() == want and (inputs[6:] == 1).all()

    gate, up, down = gaussian(640, 256)
    down[:, :6] *= factors
    up[3] *= 16  # hidden values as much larger as the column is smaller
    down[:, 6] /= 16  # up's rms may not go below 2^-7
    up[7], gate[7] = 16 * up[7], gate[7] / 16
    gate[8] = 0
    up[9], gate[9] = 1e7 * up[9], 1e-9 * gate[9]  # up may not leave fp16
    inputs, hidden = column_scales(gate, up, down)
    assert hidden[:10].tolist() == [1, 2, 8, 0.0625, 64, 1, 0.5, 1, 1, 1] and (hidden[10:] == 1).all()


@pytest.mark.parametrize(("method", "group"), WEIGHT_ERROR)
def test_outlier_columns_cost_the_others_little(method, group):
    layout = ExpertLayout(method, 1024, 256, group)
    plain, weights = gaussian(1024, 256), outlier_columns(1024, 256)
    stored = packed(layout, weights).dequantize(0)
    for got, want, before in zip(stored, weights, plain, strict=True):
        others = (want == before).all(0)
        assert 0.98 < others.float().mean() < 1
        error = ((got - want)[:, others].norm() / want[:, others].norm()).item()
        assert error < OUTLIERS_COST[method] * WEIGHT_ERROR[method, group]
        assert ((got - want)[:, ~others].norm() / want[:, ~others].norm()).item() < WEIGHT_ERROR[method, group]


def test_groups_and_books():
    assert ExpertLayout("INT8", 256, 128).group == 128
    assert (ExpertLayout("INT4", 256, 128).group, ExpertLayout("INT4", 256, 128).book) == (128, "gaussian")
    assert ExpertLayout("INT4", 256, 128, book="linear").group == 32
    assert (ExpertLayout("BF16", 256, 128).group, ExpertLayout("BF16", 256, 128).book) == (0, "")
    for group, bits in ((32, 4.5), (64, 4.25), (128, 4.125)):
        assert bits < ExpertLayout("INT4", 6144, 2048, group, "linear").bits_per_weight < bits + 0.004
        layout = ExpertLayout("INT4", 6144, 2048, group)
        assert bits + 0.25 < layout.bits_per_weight < bits + 0.254
        assert layout == ExpertLayout("INT4", 6144, 2048, group, "gaussian")
    weights = [w[None] for w in gaussian(130, 17)]
    assert pack_experts(*weights, method="INT4", group=64).layout == ExpertLayout("INT4", 130, 17, 64)


def test_a_linear_book_holds_linear_codes():
    """Weights that are a multiple -8..7 of a scale come back as they were, as an imported checkpoint must."""
    g = torch.Generator().manual_seed(0)
    weights = []
    for rows, cols in ((32, 128), (32, 128), (128, 32)):
        codes = torch.randint(-7, 8, (rows, cols // 32, 32), generator=g)
        codes[:, :, 5] = -8
        weights.append((codes * 2.0**-7).view(rows, cols))
    layout = ExpertLayout("INT4", 128, 32, book="linear")
    assert layout._c.books[:16] == list(range(-8, 8)) and layout._c.books == layout._c.books[:16] * 4
    experts = packed(layout, weights)
    assert_same(experts.dequantize(0), weights)
    assert_same(layout.unpack(experts.blob(0), torch.float32), weights)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("INT4", 64, 64, 16), "group is 16, must be 32, 64 or 128 in INT4"),
        (("INT8", 64, 64, -32), "group is -32, must be"),
        (("BF16", 64, 64, 32), "group is 32, but BF16 has no groups"),
        (("INT4", 64, 64, 32, "square"), "book is 'square', must be gaussian or linear"),
        (("INT8", 64, 64, 32, "linear"), "book is 'linear', but INT8 has no books"),
    ],
)
def test_layouts_that_do_not_exist(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExpertLayout(*arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", INTEGERS)
def test_weights_that_are_no_numbers_are_refused(method, value):
    weights = gaussian(64, 40)
    weights[2][33, 7] = value
    with pytest.raises(ValueError, match=f"row 33 of a matrix holds a weight that is NaN or infinite; {method}"):
        packed(ExpertLayout(method, 64, 40), weights)
