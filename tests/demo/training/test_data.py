import numpy as np
import pytest
import torch
from training import write_toy_data

from hetero_glm5.demo.training.data import Stream
from hetero_glm5.demo.training.kernels import CHUNK


@pytest.fixture
def stream(tmp_path):
    write_toy_data(tmp_path)
    return Stream(tmp_path, "train", 2)


def test_every_document_is_in_one_batch(stream):
    count = stream.open(0, 512, (0, 512))
    packed = sorted(document for batch in stream.packed for document in batch)
    lost = set(range(120)) - set(packed)
    assert len(packed) == len(set(packed)) and stream.lengths[list(lost)].sum() < 512
    assert all(stream.lengths[batch].sum() <= 512 for batch in stream.packed)
    assert count == len(stream.packed) >= 4
    assert stream.open(1, 512, (0, 512)) and stream.open(2, 512, (0, 512)), "files are read again"


def test_limits(stream):
    stream.open(0, 512, (20, 30))
    lengths = stream.lengths[[document for batch in stream.packed for document in batch]]
    assert len(lengths) and lengths.min() >= 20 and lengths.max() <= 30


def test_a_batch(stream):
    stream.open(0, 512, (0, 512))
    batch = stream.batch(1)
    documents = stream.packed[1]
    assert [b - a for a, b in batch.spans][: len(documents)] == stream.lengths[documents].tolist()
    assert batch.spans[-1][1] == 512 and len(batch.rows) % CHUNK == 0
    real = batch.weights > 0
    last = torch.tensor([b - 1 for _, b in batch.spans])
    assert not torch.isin(batch.rows[real], last).any()
    assert torch.equal(batch.targets[real], batch.tokens[batch.rows[real] + 1])
    for (a, b), document in zip(batch.spans, documents, strict=False):
        end = stream.arrays["ends"][document]
        assert np.array_equal(batch.tokens[a:b], stream.arrays["tokens"][end - (b - a) : end])
        inside = real & (batch.rows >= a) & (batch.rows < b)
        written = batch.rows[inside & (batch.kinds < 6)]
        assert torch.equal(written, torch.arange(a + (b - a) // 2 - 1, b - 1)), "all of the model's own are scored"
        assert set(batch.weights[inside & (batch.kinds >= 6)].tolist()) <= {np.float32(0.6)}
