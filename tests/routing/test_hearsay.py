from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.address_ranges import crowded_range
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.hearsay import Hearsay, in_turns


def heard(peer_id: str, teller: str, number: int, address: str = "", tellers: int = 1) -> Hearsay:
    addrs = (address,) if address else ()
    said = Announcement(peer_id, "model", "a" * 32, BlockSpan(0, 4), "float32", 10.0, 1000, 1, addrs=addrs)
    return Hearsay(said, teller, number, tellers, crowded_range(addrs))


def order(peers: list[Hearsay]) -> list[str]:
    return [each.peer_id for each in in_turns(peers)]


def test_those_who_told_take_turns() -> None:
    many = [heard(f"x{n}", "evil", n) for n in range(1000)]
    few = [heard("p", "one", 1000), heard("q", "another", 1001)]
    assert order(many + few)[:4] == ["x0", "p", "q", "x1"]


def test_so_do_the_address_ranges_of_what_one_of_them_told() -> None:
    many = [heard(f"x{n}", "one", n, f"/ip4/11.0.{n % 3}.{n % 250}/tcp/1") for n in range(1000)]
    honest = heard("p", "one", 1000, "/ip4/12.0.0.1/tcp/1")
    assert order([*many, honest])[:5] == ["x0", "x1", "x2", "p", "x3"]


def test_what_several_told_comes_before_what_came_first() -> None:
    assert order([heard("first", "one", 1), heard("second", "one", 2, tellers=2)]) == ["second", "first"]


def test_an_invented_local_address_puts_nobody_in_a_range_of_their_own() -> None:
    """Addresses of every second home: they come in the order in which they were told of."""
    many = [heard(f"x{n}", "one", n, f"/ip4/192.168.1.{n}/tcp/1") for n in range(3)]
    assert order(many) == ["x0", "x1", "x2"]
