"""Half precision to float against torch, every code; and back, rounding included."""

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


def test_rounding():
    """Every code, its float neighbours, and every midpoint between two codes."""
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float().numpy()
    finite = np.sort(codes[np.isfinite(codes)])
    middles = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate([codes, middles, [65519.99, 65520.0, 1e30, -1e30, 1e-30]]).astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)], dtype=np.float32)
    got = _C.testing.float_to_fp16(values)
    want = torch.from_numpy(values).half().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(got[~nan], want[~nan])
    assert np.isnan(_C.testing.fp16_to_float(got[nan])).all()
