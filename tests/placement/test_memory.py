from dataclasses import replace

import pytest

from hetero_glm5.core import UserError
from hetero_glm5.placement.memory import GIB, Limits, Needs, host_experts_fit, plan_memory

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
    assert "dense weights 35.64 GiB" in device and "2250 experts" in device and "16950 experts" in host


def test_host_experts_in_files_take_no_memory():
    mapped = replace(NEEDS, mapped=True)
    assert plan(140, 8, mapped).kv_tokens == plan(140, 768).kv_tokens
    assert plan(140, 8, mapped, shared=True).kv_tokens == plan(140, 768).kv_tokens
    assert plan(140, 8, mapped).report()[1].endswith("GiB, in files")
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
