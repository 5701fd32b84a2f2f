"""The page in Chromium: a text along its route, a hop that dies, holes, trust and proofs, a training, a key,
a phone, and no mouse.

`make page` installs what it needs, and runs it.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.store import FILE_NAME
from p2pinfer.web.trainings import noted_training

from ..e2e.support import NodeProcess
from ..ports import free_port

playwright_api: Any = pytest.importorskip("playwright.sync_api", reason="needs playwright; see `make page`")
axe_api: Any = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe; see `make page`"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; see `make page`"),
]

LIAR = "12D3KooWEyopopk1xKw2BJtYCuLiarLiarLiarLiarLiarLiarLi"
WITNESS = "12D3KooWEyopopk1xKw2BJtYCuWitnessWitnessWitnessWitne"
SENTENCE = "Once upon a time there was a little robot"
KEY = "0123456789abcdef"


@contextmanager
def serving(home: Path, *flags: str) -> Generator[str]:
    """URL of a `p2pinfer serve` that ends with the block."""
    argv = [
        sys.executable,
        "-m",
        "p2pinfer",
        "serve",
        "--port",
        "0",
        "--json",
        "--data-dir",
        str(home),
        *flags,
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["urls"][0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server with a swarm of its own, a training that ended, and a peer that this computer has banned."""
    home = tmp_path_factory.mktemp("server")
    trio.run(note_training, home)
    ledger = Ledger.open(home / FILE_NAME)
    ledger.ban(LIAR, why="sent nonsense", now=time.time())
    ledger.close()
    with serving(home) as found:
        yield found


@pytest.fixture(scope="module")
def half_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server of a swarm that lacks half of the blocks, with a peer that a proof has banned."""
    home = tmp_path_factory.mktemp("half")
    ledger = Ledger.open(home / FILE_NAME)
    ledger.add_proof("p1", LIAR, time.time(), verified=True, sender=WITNESS, why="blocks 3:5 differ")
    ledger.close()
    common = ("--dtype", "float32", "--set", f"cache_dir={home}", "--name", "Anna's attic")
    node = NodeProcess(home / "node", "--blocks", "0:4", "--listen", "/ip4/127.0.0.1/tcp/0", *common)
    try:
        _, address = node.ready()
        with serving(home, "--bootstrap", address) as found:
            yield found
    finally:
        node.signal(signal.SIGKILL)
        node.end()


async def note_training(home: Path) -> None:
    async with noted_training(home, "stories", "tiny-stories") as board:
        board.show(4, 4, [3.0, 2.5, 2.25, 2.0], 100.0, 0.0)


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    """Chromium, without a window."""
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Generator[Any]:
    """A tab in which nothing may go wrong, and which may ask nobody but the server."""
    with browser.new_context() as context:
        opened = context.new_page()
        wrong: list[str] = []

        def fail(error: Any) -> None:
            wrong.append(str(error))

        def hear(said: Any) -> None:
            if said.type == "error":
                wrong.append(str(said.text))

        def look(request: Any) -> None:
            if "//127.0.0.1:" not in request.url:
                wrong.append(str(request.url))

        opened.on("pageerror", fail)
        opened.on("console", hear)
        opened.on("request", look)
        yield opened
        assert [each for each in wrong if "401" not in each] == []


def send(page: Any, text: str = SENTENCE) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_an_answer_says_where_it_came_from(page: Any, url: str) -> None:
    page.goto(url)
    page.locator("#peers li").nth(2).wait_for()
    assert "all 8 blocks" in page.locator("#coverage").inner_text()
    send(page)
    page.locator(".origin").wait_for(timeout=60_000)
    assert "3 hops" in page.locator(".origin").inner_text()
    assert len(page.locator("#log .model .said").inner_text()) > 10
    assert page.locator("#route .hop").count() == 4  # you, and three hops
    assert "ms" in page.locator("#route .ms").first.inner_text()


def test_the_bars_of_a_running_text_are_marked(page: Any, url: str) -> None:
    page.goto(url)
    page.locator("#peers li").nth(2).wait_for()
    assert page.locator("#peers .running").count() == 0
    page.get_by_label("At most").fill("600")
    send(page)
    page.locator("#peers .running").nth(2).wait_for(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("document.querySelectorAll('#peers .running').length === 0")


def test_trust_is_told_in_words_and_a_ban_with_its_proof(page: Any, half_url: str) -> None:
    page.goto(half_url)
    page.locator("#peers summary").first.click(timeout=30_000)
    told = page.locator("#peers details[open]").inner_text()
    assert "Integrity 0." in told
    assert "reliability 0." in told
    assert "newcomer" in told
    assert "dial it" in told  # how it is reached
    assert "\N{LEFT DOUBLE QUOTATION MARK}Anna's attic\N{RIGHT DOUBLE QUOTATION MARK}" in told
    ban = page.locator("#bans li").inner_text()
    assert f"{LIAR[-6:]} banned by a proof" in ban
    assert "blocks 3:5 differ" in ban
    assert f"{WITNESS[-6:]}: it was run again here and holds" in ban


def test_bans_of_this_computer_are_shown_beside_a_swarm_of_its_own(page: Any, url: str) -> None:
    page.goto(url)
    page.locator("#bans li").wait_for()
    assert f"{LIAR[-6:]} banned by you" in page.locator("#bans li").inner_text()
    assert "sent nonsense" in page.locator("#bans li").inner_text()


def test_a_training_is_drawn_while_it_runs(page: Any, tmp_path: Path) -> None:
    data = tmp_path / "stories.jsonl"
    data.write_text('{"prompt": "Tom has a cat.", "completion": " It is red and likes to run."}\n' * 800)
    tune = [sys.executable, "-m", "p2pinfer", "tune", "--data", str(data), "--out", str(tmp_path / "adapter")]
    with serving(tmp_path / "home") as url:
        page.goto(url)
        page.locator("#peers li").first.wait_for()
        assert page.locator("#training").is_hidden()
        with subprocess.Popen([*tune, "-q", "--data-dir", str(tmp_path / "home")]) as process:
            try:
                page.locator("#trainings .running .curve").wait_for(timeout=90_000)
                assert "after step" in page.locator("#trainings .curve").get_attribute("aria-label")
                points = page.locator("#trainings .line").get_attribute("points")
                page.wait_for_function(
                    "before => document.querySelector('#trainings .line').getAttribute('points') !== before",
                    arg=points,
                    timeout=30_000,
                )
            finally:
                process.kill()
        page.locator("#trainings .interrupted").wait_for(timeout=30_000)


def test_blocks_that_nobody_serves_are_a_hole_in_red(page: Any, half_url: str) -> None:
    page.goto(half_url)
    page.get_by_text("Nobody serves blocks 4\N{EN DASH}7.").wait_for(timeout=30_000)
    colour = page.locator("#axis .hole").evaluate("each => getComputedStyle(each).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    assert red > 2 * max(green, blue)


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_axe_finds_nothing_in_a_swarm_with_holes_and_bans(
    browser: Any, half_url: str, scheme: str, width: int
) -> None:
    with browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True
    ) as context:
        page = context.new_page()
        page.goto(half_url)
        page.locator("#peers summary").first.click(timeout=30_000)
        page.locator("#axis .hole").wait_for(state="attached")
        page.locator("#bans li").wait_for()
        found = axe_api.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_answer_that_is_stopped_stays_as_it_is(page: Any, url: str) -> None:
    page.goto(url)
    page.locator("#peers li").first.wait_for()
    page.get_by_label("At most").fill("600")
    send(page)
    page.locator(".model .said").filter(has_text=re.compile(".{6}")).wait_for(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_everything_is_reached_without_a_mouse(page: Any, url: str) -> None:
    page.goto(url)
    page.locator("#peers li").first.wait_for()
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    page.locator(".origin").wait_for(timeout=60_000)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert "Integrity" in page.locator("#peers details[open]").inner_text()
    page.wait_for_timeout(3500)  # the swarm is drawn anew meanwhile
    assert page.locator("#peers details[open]").count() == 1
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_and_no_width_needs_sideways_scrolling(
    browser: Any, url: str, scheme: str, width: int
) -> None:
    with browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True
    ) as context:
        page = context.new_page()
        page.goto(url)
        page.locator("#peers li").first.wait_for()
        page.locator("#peers summary").first.click()
        page.locator("#trainings .curve").wait_for()
        send(page)
        page.locator(".origin").wait_for(timeout=60_000)
        found = axe_api.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_first_words_are_there_within_a_fifth_of_a_second(page: Any, url: str) -> None:
    for _ in range(3):  # the first time, Chromium itself warms up
        page.goto(url)
        page.locator("#peers li").first.wait_for()
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first paint after {painted:.0f} ms")
    assert painted < 1000  # 200 ms where nothing else runs


def test_a_key_is_asked_for_where_one_is_wanted(page: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "keys").chmod(0o600)
    with serving(tmp_path, "--api-key-file", str(tmp_path / "keys")) as url:
        page.goto(url)
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#peers li").first.wait_for()
        send(page)
        page.locator(".origin").wait_for(timeout=60_000)


def test_one_of_several_models_is_chosen_and_answers(page: Any, tiny_stories: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_stories, tmp_path / "teller")
    node = NodeProcess(tmp_path / "node", "--blocks", "0:8", "--set", f"cache_dir={tmp_path}")
    try:
        _, address = node.ready()
        models = ("--model", "tiny-stories", "--model", str(folder))
        with serving(tmp_path / "home", "--bootstrap", address, *models) as url:
            page.goto(url)
            page.locator("#peers li").first.wait_for(timeout=30_000)
            assert "tiny-stories, 8 blocks" in page.locator("#model").inner_text()
            page.get_by_label("Model", exact=True).select_option("teller")
            page.get_by_text("teller, 8 blocks").wait_for()
            send(page)
            page.locator(".origin").wait_for(timeout=60_000)
            assert page.locator("#log .model .who").inner_text() == "teller"
            page.wait_for_timeout(3500)  # the swarm is drawn anew meanwhile
            assert page.get_by_label("Model", exact=True).input_value() == "teller"
    finally:
        node.signal(signal.SIGKILL)
        node.end()


def test_a_hop_that_dies_is_shown_and_the_text_goes_on(page: Any, tmp_path: Path) -> None:
    port = free_port()
    common = ("--dtype", "float32", "--set", f"cache_dir={tmp_path}")
    first = NodeProcess(tmp_path / "0", "--blocks", "0:4", "--listen", f"/ip4/127.0.0.1/tcp/{port}", *common)
    nodes = [first]
    try:
        peer_id, address = first.ready()
        join = ("--bootstrap", address)
        nodes += [NodeProcess(tmp_path / str(i), "--blocks", "4:8", *join, *common) for i in (1, 2)]
        nodes.append(NodeProcess(tmp_path / "3", "--blocks", "0:4", *join, *common))
        by_id = {peer_id: first} | {node.ready()[0]: node for node in nodes[1:]}
        with serving(tmp_path / "server", *join) as url:
            page.goto(url)
            page.locator("#peers li").nth(3).wait_for(timeout=30_000)
            page.get_by_label("At most").fill("400")
            send(page)
            page.locator(".model .said").filter(has_text=re.compile(".{6}")).wait_for(timeout=60_000)
            last = page.locator("#route .hop").last.get_attribute("data-peer")
            by_id[last or peer_id].signal(signal.SIGKILL)
            page.locator("#happenings .bad").first.wait_for(timeout=30_000)
            page.get_by_text("was replaced, and the text goes on").wait_for(timeout=30_000)
            page.locator(".origin").wait_for(timeout=120_000)
            assert "1 failed and replaced" in page.locator(".origin").inner_text()
    finally:
        for node in nodes:
            node.signal(signal.SIGKILL)
            node.end()
