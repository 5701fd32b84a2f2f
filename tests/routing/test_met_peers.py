from p2pinfer.routing.met_peers import MetPeers


def test_a_peer_is_met_until_others_of_its_own_range_are_too_many() -> None:
    met = MetPeers(most=100, most_per_range=2)
    met.note("honest", "one")
    for number in range(50):
        met.note(f"x{number}", "two")
    assert "honest" in met
    assert [f"x{number}" in met for number in (47, 48, 49)] == [False, True, True]
    assert len(met) == 3


def test_peers_of_networks_that_are_everywhere_have_no_such_bound() -> None:
    met = MetPeers(most=100, most_per_range=2)
    for number in range(50):
        met.note(f"p{number}", "")
    assert len(met) == 50


def test_all_together_are_bounded_and_a_peer_that_comes_again_stays() -> None:
    met = MetPeers(most=3, most_per_range=9)
    for name in ("a", "b", "c", "a", "d"):
        met.note(name, name)
    assert [name in met for name in "abcd"] == [True, False, True, True]


def test_only_who_never_answered_has_failed() -> None:
    met = MetPeers(most=3, most_per_range=9)
    met.note("met", "")
    for name in ("met", "x", "y"):
        met.note_failed(name)
    assert list(met.failed()) == ["x", "y"]
    met.note("x", "")
    assert list(met.failed()) == ["y"]
