import os
from pathlib import Path

import numpy as np
import pytest

from hetero_glm5 import _C

NODE = _C.topology()[0]["id"]


@pytest.mark.parametrize("size", [1, 4096, 5 << 20])
@pytest.mark.parametrize("nodes", [[], [_C.topology()[0]["id"]], [n["id"] for n in _C.topology()] + [63]])
def test_zeroed_aligned_writable(size, nodes):
    memory = _C.testing.arena(size, nodes)
    assert memory.nbytes == size and not memory.any()
    assert memory.ctypes.data % (2 << 20) == 0
    memory[:] = 7
    assert np.all(memory == 7)


def policy(array: np.ndarray) -> str:
    """The kernel's memory policy where an array lies: default, bind:0, interleave:0-1 ..."""
    starts = [line.split()[:2] for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    return [word for start, word in starts if int(start, 16) <= array.ctypes.data][-1]


@pytest.mark.skipif(not _C.binds_memory(NODE), reason="the kernel refuses to bind memory here")
@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel does not tell memory policies")
def test_memory_is_bound_to_its_node():
    layout = _C.ExpertLayout("BF16", 48, 32)
    assert policy(_C.testing.arena(5 << 20, [NODE])) == policy(_C.ExpertWeights(layout, 5, [1, 3], [NODE]).blob(3))
    assert policy(_C.testing.arena(4096, [NODE])) == f"bind:{NODE}"
    assert policy(_C.testing.arena(4096, [])) == "default"


def packed_file(path, layout, blobs) -> np.ndarray:
    content = np.random.default_rng(0).integers(0, 256, (blobs, layout.blob_bytes), dtype=np.uint8)
    path.write_bytes(bytes(4096) + content.tobytes())
    return content


def test_a_file_stands_in_for_an_experts_memory(tmp_path):
    layout, path = _C.ExpertLayout("BF16", 48, 32), tmp_path / "file"
    content, weights = packed_file(path, layout, 3), _C.ExpertWeights(layout, 5, [1, 3, 4])
    before = weights.blob(3)
    file = os.open(path, os.O_RDONLY)
    weights.map(3, file, 4096 + layout.blob_bytes)
    weights.map(4, file, 4096)
    with pytest.raises(ValueError, match="leave the file"):
        weights.map(1, file, 4096 + 3 * layout.blob_bytes)
    with pytest.raises(ValueError, match="not whole pages"):
        weights.map(1, file, 100)
    with pytest.raises(ValueError, match="not resident"):
        weights.map(0, file, 4096)
    os.close(file)
    with pytest.raises(ValueError, match="cannot map file"):
        weights.map(1, -1, 4096)
    assert np.array_equal(before, content[1]) and np.array_equal(weights.blob(4), content[0])
    assert not weights.blob(1).any()
    before[:] = 7  # a private copy
    assert path.read_bytes()[4096:] == content.tobytes()
