import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hetero_glm5.core import UserError
from hetero_glm5.placement.stats import load_counts

COUNTS = torch.arange(2 * 5 * 4).view(2, 5, 4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("every_layer", [True, False])
def test_counts_of_all_layers_or_of_moe_layers(tmp_path, suffix, every_layer):
    data = {"logical_count": COUNTS if every_layer else COUNTS[:, 2:].contiguous()}
    path = tmp_path / f"counts{suffix}"
    torch.save(data, path) if suffix == ".pt" else save_file(data, str(path))
    counts = load_counts(str(path), (2, 3, 4), 5, 4)
    assert np.array_equal(counts, COUNTS.sum(0)[2:].numpy())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"other": COUNTS}, "logical_count"),
        ([1, 2], "logical_count"),
        ({"logical_count": COUNTS[..., :3]}, "5 layers of 3 experts"),
        ({"logical_count": -COUNTS}, "negative"),
        ({"logical_count": COUNTS.to_sparse()}, "no real tensor"),
        ({"logical_count": COUNTS * 1j}, "no real tensor"),
    ],
)
def test_files_that_do_not_fit(tmp_path, data, words):
    torch.save(data, tmp_path / "c.pt")
    with pytest.raises(UserError, match=words):
        load_counts(str(tmp_path / "c.pt"), (2, 3, 4), 5, 4)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "junk.pt", "junk.safetensors"])
def test_files_that_cannot_be_read(tmp_path, name):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read|is no file"):
        load_counts(str(tmp_path / name), (2, 3, 4), 5, 4)
