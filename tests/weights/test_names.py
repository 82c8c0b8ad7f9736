import pytest
from shapes import GLM5

from hetero_glm5 import _C
from hetero_glm5.model_config import FP8_BLOCK, ModelConfig
from hetero_glm5.weights.names import expected_tensors, scale_shape


@pytest.mark.parametrize(
    ("share", "tensors", "with_scales"),
    [({}, 59_870, 119_028), ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, None, 118_629)],
)
def test_the_table_counts_what_the_published_indexes_count(share, tensors, with_scales):
    table = expected_tensors(ModelConfig.parse(GLM5 | share), mtp=True)
    assert tensors is None or len(table) == tensors
    assert len(table) + sum(spec.quantised for spec in table.values()) == with_scales


def test_the_mtp_layer_has_791_tensors_and_the_model_744_billion_parameters():
    config = ModelConfig.parse(GLM5)
    whole, model = expected_tensors(config, mtp=True), expected_tensors(config, mtp=False)
    assert len(whole) - len(model) == 791
    count = sum(spec.shape[0] * (spec.shape[1] if len(spec.shape) > 1 else 1) for spec in model.values())
    assert round(count / 1e9, 3) == 743.911


def test_python_and_the_extension_mean_the_same_blocks():
    assert FP8_BLOCK == _C.FP8_BLOCK


def test_scale_grids_are_rounded_up():
    assert scale_shape((576, 6144)) == (5, 48) and scale_shape((128, 128)) == (1, 1)
