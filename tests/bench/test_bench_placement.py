from bench_placement import measure

from hetero_glm5.placement.comparison import MACHINES, Case
from hetero_glm5.placement.synthetic import Conversations


def test_a_row():
    talk = Conversations(3, 64, 4, users=2, prompt=(20, 30), answer=(40, 60))
    row = measure(Case(talk.steps(250), MACHINES["rtx4090"], 4, 50), 0.2)
    assert row["hit_rate"]["adaptive"] <= row["bound"]
    assert 0.5 < row["over_fixed_f"] < 1.05 and 0 < row["quarter"] < 1
