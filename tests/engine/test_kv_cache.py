import pytest

from hetero_glm5.engine.kv_cache import PagePool


def test_pages_grow_and_come_back():
    pool = PagePool(4, 8)
    a: list[int] = []
    b: list[int] = []
    assert pool.grow(a, 9) and len(a) == 2
    assert pool.grow(a, 16) and len(a) == 2
    assert pool.grow(b, 16) and pool.num_free == 0
    assert not set(a) & set(b)
    assert not pool.grow(a, 17) and len(a) == 2, "a refusal takes nothing"
    pool.release(b)
    assert b == [] and pool.grow(a, 32) and pool.num_free == 0
    pool.release(a)
    assert pool.num_free == 4


def test_giving_a_page_back_twice_is_noticed():
    pool = PagePool(2, 8)
    pages: list[int] = []
    pool.grow(pages, 16)
    copy = list(pages)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.release(copy)
