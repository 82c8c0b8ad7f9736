import numpy as np
import pytest

from hetero_glm5 import _C


@pytest.mark.parametrize("size", [1, 4096, 5 << 20])
@pytest.mark.parametrize("nodes", [[], [_C.topology()[0]["id"]], [n["id"] for n in _C.topology()] + [63]])
def test_zeroed_aligned_writable(size, nodes):
    memory = _C.testing.arena(size, nodes)
    assert memory.nbytes == size and not memory.any()
    assert memory.ctypes.data % (2 << 20) == 0
    memory[:] = 7
    assert np.all(memory == 7)
