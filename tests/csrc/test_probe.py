"""The benchmarks' probes: every instruction present has a positive peak, memory is read, nothing absent runs."""

import pytest

from hetero_glm5 import _C

probe = _C.probe


@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_present_has_a_peak(threads):
    roofs = probe.Roofs(threads)
    assert roofs.threads == threads
    assert probe.instructions()[-1] == "mulps"  # the baseline's
    for name in probe.instructions():
        assert roofs.peak(name) > 1e6


def test_instructions_follow_the_isas():
    assert ("tdpbsud" in probe.instructions()) == ("tdpbf16ps" in probe.instructions()) == ("amx" in _C.isas())
    assert ("fma512" in probe.instructions()) == ("avx512" in _C.isas())
    assert ("fma256" in probe.instructions()) == ("avx2" in _C.isas())


def test_reading_rounds_up_to_whole_chunks():
    roofs = probe.Roofs(2, (1 << 20) + 1)
    assert roofs.nbytes == 2 << 20
    assert roofs.read() > 1e6


def test_wrong_calls_are_refused():
    roofs = probe.Roofs(1)
    with pytest.raises(ValueError, match="no memory"):
        roofs.read()
    with pytest.raises(ValueError, match="'nonsense' cannot be measured"):
        roofs.peak("nonsense")
    with pytest.raises(ValueError, match="-1 bytes"):
        probe.Roofs(1, -1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_fork_join_takes_at_least_its_longest_task(threads):
    seconds = probe.fork_join(threads, threads, body=1e-5, gap=1e-5, calls=20)
    assert len(seconds) == 20 and min(seconds) >= 1e-5


def test_hand_over():
    there, back = probe.hand_over(gap=0.0, calls=50)
    assert len(there) == len(back) == 50 and all(0 < a < b < 1 for a, b in zip(there, back, strict=True))
