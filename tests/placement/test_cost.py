import numpy as np
import pytest

from hetero_glm5.placement.cost import Costs, Curve


def test_a_layer_takes_as_long_as_its_slower_side():
    costs = Costs(10, Curve((1,), (0.4,)), Curve((1,), (0.1,)), link=5.0, host_call=0.5, device_call=0.25,
                  copy_call=0.0, layer=3.0)  # fmt: skip
    tokens = np.array([[1, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    resident = np.array([[True, False, False, True], [False] * 4, [True] * 4])
    fetched = np.array([[False, True, False, False], [False] * 4, [False] * 4])
    layers = costs.layers(tokens, resident, fetched)
    assert layers.host == pytest.approx([4.5, 8.5, 0])
    assert layers.link == pytest.approx([2, 0, 0])
    assert layers.device == pytest.approx([0.25 + max(1, 2) + 1, 0, 0])
    assert layers.seconds == pytest.approx([7.5, 11.5, 3])


def test_a_curve_is_constant_then_linear_then_proportional():
    curve = Curve((2, 4), (1.0, 3.0))
    assert curve(np.array([0, 1, 3, 4, 8])) == pytest.approx([0, 1, 2, 3, 6])
