"""E4M3 to float and back against torch. (The kernels' widening: test_cpu_tier.py.)"""

import numpy as np
import torch

from hetero_glm5 import _C


def test_every_code():
    codes = np.arange(256, dtype=np.uint8)
    got, want = _C.testing.e4m3_to_float(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    nan = np.isnan(want)
    assert nan.sum() == 2 and np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def test_the_nearest_code():
    """All codes, what lies halfway between two, and what lies just beside that; then any floats at all."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    halfway = ((codes[1:] + codes[:-1]) / 2).float().numpy()
    beside = [np.nextafter(halfway, np.float32(to)) for to in (0, np.inf)]
    patterns = np.random.default_rng(2).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    large = np.array([464.0, 464.1, 480.0, np.inf, np.nan], np.float32)
    values = np.concatenate([codes.float().numpy(), halfway, *beside, large, patterns])
    values = np.concatenate([values, -values])
    want = torch.from_numpy(values).to(torch.float8_e4m3fn)
    nan = want.float().isnan().numpy()
    got = _C.testing.float_to_e4m3(values)
    assert np.array_equal(got[~nan], want.view(torch.uint8).numpy()[~nan]) and (got[nan] & 127 == 127).all()
