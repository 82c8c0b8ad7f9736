"""The most recent values, up to a size."""

from hypothesis import given
from hypothesis import strategies as st

from hetero_glm5.server.recent import Recent

ACTIONS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6) | st.none()))


@given(ACTIONS)
def test_against_a_list(actions):
    """None is a look, a number is a value of that size."""
    recent, model = Recent(10), []  # model: (name, size), the least recently used first
    for name, size in actions:
        known = [entry for entry in model if entry[0] == name]
        model = [entry for entry in model if entry[0] != name]
        if size is None:
            assert recent.get(name) == (known[0][1] if known else None)
            model += known
        else:
            recent.put(name, size, size)
            model.append((name, size))
            while sum(entry[1] for entry in model) > 10:
                model.pop(0)
    for name, size in model:
        assert recent.get(name) == size


def test_what_is_too_large_is_not_kept():
    recent = Recent(10)
    recent.put("a", 1, 5)
    recent.put("b", 2, 11)
    assert recent.get("a") is None and recent.get("b") is None
