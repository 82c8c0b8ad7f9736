"""Counts, and the files that hold them: what is written is read, also as SGLang writes it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_glm5.core import UserError
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.stats import RoutingStats, load_counts, save_tensors

MODEL = ModelConfig.parse(tiny_config(n_routed_experts=4, num_experts_per_tok=2))  # 5 layers, the last 3 MoE
COUNTS = torch.arange(2 * 5 * 4).view(2, 5, 4)


def routed(rng, tokens):
    """int64 [3, 4]: what `tokens` tokens add in each MoE layer."""
    return np.stack(
        [
            np.bincount(rng.permuted(np.tile(np.arange(4), (tokens, 1)), axis=1)[:, :2].ravel(), minlength=4)
            for _ in range(3)
        ]
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("every_layer", [True, False])
def test_counts_of_all_layers_or_of_moe_layers(tmp_path, suffix, every_layer):
    data = {"logical_count": COUNTS if every_layer else COUNTS[:, 2:].contiguous()}
    path = tmp_path / f"counts{suffix}"
    torch.save(data, path) if suffix == ".pt" else save_file(data, str(path))
    counts = load_counts(str(path), MODEL)
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
        load_counts(str(tmp_path / "c.pt"), MODEL)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "junk.pt", "junk.safetensors"])
def test_files_that_cannot_be_read(tmp_path, name):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read|is no file"):
        load_counts(str(tmp_path / name), MODEL)


def test_steps_merge():
    rng = np.random.default_rng(1)
    steps = [(routed(rng, d), routed(rng, p)) for d, p in ((1, 0), (0, 9), (3, 4), (0, 0))]
    one_by_one, together = RoutingStats(MODEL), RoutingStats(MODEL)
    for step in steps:
        one_by_one.add(*step)
    together.add(*(sum(parts) for parts in zip(*steps, strict=True)))
    assert np.array_equal(one_by_one.counts, together.counts) and one_by_one.tokens == (4, 13)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_statistics_are_read_as_counts(tmp_path, suffix):
    rng = np.random.default_rng(2)
    stats = RoutingStats(MODEL)
    for _ in range(3):
        stats.add(routed(rng, 7), routed(rng, 50))
    path = tmp_path / f"stats{suffix}"
    save_tensors(path, stats.tensors)
    assert np.array_equal(load_counts(str(path), MODEL), stats.counts.sum(0)) and stats.counts.all()
    written = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    assert written["logical_count"].shape == (1, 5, 4) and not written["logical_count"][0, :2].any()
    for phase, counts in zip(("decode", "prefill"), stats.counts, strict=True):
        assert np.array_equal(written[f"{phase}_count"][2:], counts)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["absent/c.pt", "absent/c.safetensors"])
def test_a_file_that_cannot_be_written(tmp_path, name):
    with pytest.raises(OSError, match=f"{name} cannot be written"):
        save_tensors(tmp_path / name, {"logical_count": np.zeros((1, 2, 3))})
    assert not list(tmp_path.iterdir())
