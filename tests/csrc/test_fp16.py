"""Half precision to float against torch, every code."""

import numpy as np
import torch

from hetero_glm5 import _C


def test_every_code():
    codes = np.arange(65536, dtype=np.uint16)
    got = _C.testing.fp16_to_float(codes)
    want = torch.from_numpy(codes.view(np.int16)).view(torch.float16).float().numpy()
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))
