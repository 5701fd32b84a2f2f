from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.recent import Recent


def test_what_was_set_longest_ago_is_forgotten_first() -> None:
    recent = Recent[str, int](2)
    recent["a"], recent["b"] = 1, 2
    recent["a"] = 3  # later than b from here on
    recent["c"] = 4
    assert dict(recent) == {"a": 3, "c": 4}


def test_a_look_keeps_nothing_longer() -> None:
    recent = Recent[str, int](2)
    recent["a"], recent["b"] = 1, 2
    assert recent["a"] == recent.get("a") == 1
    recent["c"] = 3
    assert list(recent) == ["b", "c"]


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers())))
def test_it_holds_what_an_ordered_dict_cut_to_the_limit_holds(
    limit: int, steps: list[tuple[bool, int, int]]
) -> None:
    recent, oracle = Recent[int, int](limit), OrderedDict[int, int]()
    for removes, key, value in steps:
        if removes:
            assert recent.pop(key, None) == oracle.pop(key, None)
        else:
            recent[key] = oracle[key] = value
            oracle.move_to_end(key)
            while len(oracle) > limit:
                oracle.popitem(last=False)
        assert list(recent.items()) == list(oracle.items())
        assert (len(recent), key in recent) == (len(oracle), key in oracle)
