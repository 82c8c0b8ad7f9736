from bench_published import COSTS, EXPERTS, PUBLISHED, TOP_K, simulated

from hetero_glm5.placement.comparison import Case
from hetero_glm5.placement.synthetic import Conversations


def test_the_uniform_column_is_the_fit():
    talk = Conversations(2, EXPERTS, TOP_K, prompt=(300, 300), answer=(50, 50), fields=(0.7, 2.0, 0.0))
    found = simulated(Case(talk.steps(150), COSTS, TOP_K, 75), 0.5)
    assert abs(found["uniform"] / PUBLISHED[0.5]["uniform"] - 1) < 0.1
    assert found["adaptive"] > found["uniform"]
