"""bf16 against torch: every code to float, and rounding at every boundary between two codes."""

import numpy as np
import torch

from hetero_glm5 import _C


def test_every_code():
    codes = np.arange(65536, dtype=np.uint16)
    got, want = _C.testing.bf16_to_float(codes), torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16).float()
    assert np.array_equal(got.view(np.uint32), want.numpy().view(np.uint32))


def test_rounding_at_every_boundary():
    upper = np.arange(65536, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    floats = (upper[:, None] | lower).ravel().view(np.float32)
    got = _C.testing.float_to_bf16(floats).astype(np.uint16)
    nan = np.isnan(floats)
    want = torch.from_numpy(floats).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got[~nan], want[~nan])
    assert np.isnan(_C.testing.bf16_to_float(got[nan])).all()
    assert np.array_equal(got[nan] >> 15, floats[nan].view(np.uint32) >> 31)
