from dataclasses import replace

import pytest
import torch
from shapes import GLM5

from hetero_glm5.core import UserError
from hetero_glm5.model.state import activation_bytes, cache_bytes_per_token
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.memory import GIB, Limits, Needs, host_experts_fit, plan_memory
from hetero_glm5.weights.quantize import ExpertLayout

# GLM-5 in BF16 with FP8 experts, 30 of 256 on the device (glm5.md 4 and 5).
NEEDS = Needs(
    dense=38_270_000_000,
    expert=37_765_120,
    device_experts=30 * 75,
    host_experts=226 * 75,
    activations=GIB,
    kv_token=109_824,
)


def plan(device, host, needs=NEEDS, wanted=None, shared=False, nodes=()):
    nodes = tuple(node * GIB for node in nodes)
    limits = Limits(device=device * GIB, host=host * GIB, shared=shared, fraction=0.9, nodes=nodes)
    return plan_memory(needs, limits, wanted_tokens=wanted, most_tokens=202_752, page=64)


def test_the_pool_takes_what_is_left_in_whole_pages():
    fixed = NEEDS.dense + NEEDS.device_experts * NEEDS.expert + NEEDS.activations
    tokens = plan(140, 768).kv_tokens
    assert tokens % 64 == 0
    assert fixed + tokens * NEEDS.kv_token <= 140 * GIB * 0.9 < fixed + (tokens + 64) * NEEDS.kv_token
    assert plan(400, 768).kv_tokens == 202_752
    assert plan(400, 768, wanted=1000).kv_tokens == 1024


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": 140, "host": 512}, ["host memory", "16950 experts", "512.00 GiB"]),
        ({"device": 80, "host": 768}, ["dense weights 35.64 GiB", "2250 device experts", "72.00 GiB"]),
        ({"device": 140, "host": 768, "wanted": 400_000}, ["400000 tokens", "--max-total-tokens"]),
        ({"device": 64, "host": 64, "shared": True}, ["16950 host experts", "57.60 GiB"]),
        ({"device": 140, "host": 768, "nodes": (400, 310)}, ["over 2 NUMA node(s), put 298.08", "0.95 of 310.00 GiB"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(arguments, words):
    with pytest.raises(UserError) as error:
        plan(**arguments)
    assert all(word in str(error.value) for word in words)


def test_the_report_names_both_tiers():
    device, host = plan(140, 768).report()
    assert "dense weights 35.64 GiB" in device and "2250 device experts" in device and "126.00 GiB of 126.00" in device
    assert host == "host tier: 16950 experts 596.16 GiB; 596.16 GiB of 768.00 GiB"
    both = plan(800, 800, wanted=6400, shared=True).report()
    assert both[0].endswith("(6400 tokens x 109824 B)") and both[1] == "host tier: 16950 experts 596.16 GiB"
    assert both[2] == "both tiers: 712.59 GiB of 720.00 GiB (0.9 of 800.00 GiB)"


def test_host_experts_in_files_take_no_memory():
    mapped = replace(NEEDS, mapped=True)
    assert plan(140, 8, mapped).kv_tokens == plan(140, 768).kv_tokens
    assert plan(140, 8, mapped, shared=True).kv_tokens == plan(140, 768).kv_tokens
    assert plan(140, 8, mapped).report()[1] == "host tier: 16950 experts 596.16 GiB, in files; 0.00 MiB of 8.00 GiB"
    with pytest.raises(UserError) as error:
        plan(64, 8, mapped, shared=True)
    assert "host experts" not in str(error.value)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wanted", [None, 1, 100_000])
@pytest.mark.parametrize("share", [None, 0.5, 0.45])  # of the host's memory on each of two nodes
def test_host_experts_fit_exactly_if_a_plan_can_be_made_with_them(shared, wanted, share):
    verdicts = set()
    for size in range(500, 900, 10):
        host = 768 if shared else size
        nodes = (size // 2, int(size * share)) if share else ()
        bytes_of_nodes = tuple(node * GIB for node in nodes)
        limits = Limits(device=size * GIB, host=host * GIB, shared=shared, fraction=0.9, nodes=bytes_of_nodes)
        fit = host_experts_fit(NEEDS, limits, tokens=wanted or 1, page=64)
        try:
            plan(size, host, wanted=wanted, shared=shared, nodes=nodes)
        except UserError:
            assert not fit
        else:
            assert fit
        verdicts.add(fit)
    assert verdicts == {True, False}


def test_experts_that_move_keep_their_place_on_the_host():
    moving = replace(NEEDS, copies=True, staging=2, pinned=GIB // 2)
    still, moved = plan(140, 768), plan(140, 768, moving)
    assert still.kv_tokens - moved.kv_tokens == -(-2 * NEEDS.expert // NEEDS.kv_token // 64) * 64
    device, host = moved.report()
    assert "2 staging slots 72.03 MiB" in device
    assert "19200 experts 675.29 GiB, 2250 of them on the device too, pinned rows 0.50 GiB; 675.79 GiB of" in host
    assert plan(140, 640).kv_tokens == still.kv_tokens
    with pytest.raises(UserError) as error:
        plan(140, 640, moving)
    for words in (
        "19200 experts x 36.02 MiB (the 2250 on the device keep theirs, because experts move) = 675.29 GiB",
        "0.95 of 640.00 GiB available, less 0.50 GiB of pinned rows and kept KV pages, may hold them",
        "32.40 MiB for each",
        "--kt-enable-dynamic-expert-update",
    ):
        assert words in str(error.value), words


def test_pinned_rows_decide_whether_host_experts_fit():
    limits = Limits(device=140 * GIB, host=628 * GIB, shared=False, fraction=0.9)
    full = int(limits.host * 0.95) - NEEDS.host_bytes
    for pinned, fits in ((full, True), (full + 1, False)):
        assert host_experts_fit(replace(NEEDS, pinned=pinned), limits, tokens=1, page=64) == fits


GLM = ModelConfig.parse(GLM5 | {"eos_token_id": 0})
BF16_DENSE = 38_509_310_976  # weights.load.dense_bytes, which counts for seconds
OFFICIAL_FP8 = 21_180_000_000  # dense weights, were they kept as the FP8 checkpoint has them


def glm5(method: str, slots: int = 0, rows: int = 2064, **changes) -> Needs:
    """GLM-5 with its dense weights in BF16 and `slots` device experts that move."""
    return Needs(
        **{
            "dense": BF16_DENSE,
            "expert": ExpertLayout(method, GLM.hidden_size, GLM.moe_intermediate_size).blob_bytes,
            "device_experts": slots,
            "host_experts": 75 * 256 - slots,
            "activations": activation_bytes(GLM, torch.bfloat16, rows),
            "kv_token": cache_bytes_per_token(GLM, "bfloat16"),
            "copies": slots > 0,
            **changes,
        }
    )


def test_glm5_int4_on_24_and_512_gib():
    with pytest.raises(UserError) as error:
        plan(24, 512, glm5("INT4"))
    for words in ("dense weights 35.86 GiB + 0 device experts", "activations 1.67 GiB", "(0.9 of 24.00 GiB)"):
        assert words in str(error.value), words
    assert "The dense weights alone leave no room: use a device with more memory, or --device cpu." in str(error.value)
    on_cpu = plan(512, 512, glm5("INT4"), shared=True)
    assert "both tiers: 427.70 GiB of 460.80 GiB (0.9 of 512.00 GiB)" in on_cpu.report()[2]
    short = glm5("INT4", rows=528, dense=OFFICIAL_FP8)
    assert plan(24, 512, short).kv_tokens == 12288, "what FP8 dense layers would leave"


def test_glm5_fp8_on_48_and_768_gib():
    still = plan(48, 768, glm5("FP8"))
    assert still.report() == [
        "device tier: dense weights 35.86 GiB, 0 device experts 0.00 MiB, activations 1.67 GiB, KV pool 5.66 GiB "
        "(55360 tokens x 109824 B); 43.19 GiB of 43.20 GiB (0.9 of 48.00 GiB)",
        "host tier: 19200 experts 676.03 GiB; 676.03 GiB of 768.00 GiB",
    ]
    moving = plan(48, 768, glm5("FP8", slots=75, staging=2, pinned=GIB // 4))
    assert moving.kv_tokens < still.kv_tokens - 75 * glm5("FP8").expert // 109_824
    assert "2 staging slots 72.11 MiB" in moving.report()[0]
    assert "19200 experts 676.03 GiB, 75 of them on the device too, pinned rows 0.25 GiB" in moving.report()[1]
    with pytest.raises(UserError, match="225 device experts 7.92 GiB .* Lower --max-total-tokens .* --kt-num-gpu"):
        plan(48, 768, glm5("FP8", slots=225))


def test_glm5_bf16_on_80_and_256_gib():
    slots = 500
    with pytest.raises(UserError) as error:
        plan(80, 256, glm5("BF16", slots, copies=False))
    assert str(error.value) == (
        "host memory: 18700 experts x 72.00 MiB = 1314.84 GiB, but only 0.95 of 256.00 GiB available may hold them, "
        "13.32 MiB for each. Use a smaller --kt-method, put more experts on the device, or leave a packed store in its "
        "files (--kt-weight-mode mmap)."
    )
    mapped = plan(80, 256, glm5("BF16", 450, mapped=True))
    assert (
        mapped.kv_tokens > 0 and "1350.00 GiB, in files, 450 of them on the device too; 0.00 MiB" in mapped.report()[1]
    )
