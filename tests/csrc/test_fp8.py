"""E4M3 to float against torch, every code. (The kernels' widening: test_cpu_tier.py.)"""

import numpy as np
import torch

from hetero_glm5 import _C


def test_every_code():
    codes = np.arange(256, dtype=np.uint8)
    got, want = _C.testing.e4m3_to_float(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    nan = np.isnan(want)
    assert nan.sum() == 2 and np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))
