"""The page over HTTP: its files and their policy, who may ask for what, and what peers say in it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.client import Client
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.web.feed import Feed
from p2pinfer.web.site import EVENTS, POLICY, STATE, TRAININGS, Site, load_files
from p2pinfer.web.trainings import noted_training

from ..memory_client import open_memory_client

KEY = "0123456789abcdef"
MOST_BYTES = 150_000

OpenSite = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, Client]]]


@pytest.fixture
def open_site(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenSite:
    """The page and the API over peers `a` (0:5) and, unless alone, `b` (5:8), and an HTTP client."""

    @asynccontextmanager
    async def opened(
        *keys: str, alone: bool = False, kept: Ledger | None = None
    ) -> AsyncGenerator[tuple[httpx.AsyncClient, Client]]:
        feed, config = Feed(), replace(ApiConfig(), port=0)
        options: dict[str, Any] = {"on_event": feed.report}
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, **options) as (client, swarm):
            await swarm.serve("a", 0, 5)
            if not alone:
                await swarm.serve("b", 5, 8)
            app = App([client], config, keys, Site([client], feed, tmp_path, kept))
            async with open_nursery() as nursery:
                ((_, port),) = await nursery.start(serve_http, app.handle, config)
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as asking:
                    yield asking, client

    return opened


def test_the_page_is_small_and_asks_no_other_host_for_anything() -> None:
    page = load_files()
    assert "/" in page
    assert sum(len(file.body) for file in page.values()) < MOST_BYTES
    for path, file in page.items():
        text = file.body.decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|['\"]//", text), path
        # What the policy forbids would be dead: styles and scripts in the document itself.
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text), path
        assert "innerHTML" not in text, path
    named = re.findall(
        r'(?:src|href)="(/[^"#]+)"|from "\./([^"]+)"', "".join(f.body.decode() for f in page.values())
    )
    assert {path or f"/page/{module}" for path, module in named} <= page.keys()


async def test_every_file_comes_with_a_strict_policy_and_is_not_sent_twice(open_site: OpenSite) -> None:
    async with open_site() as (asking, _):
        for path, file in load_files().items():
            sent = await asking.get(path)
            assert (sent.status_code, sent.content) == (200, file.body)
            assert sent.headers.get_list("content-security-policy") == [POLICY]
            assert "unsafe" not in POLICY
            again = await asking.get(path, headers={"If-None-Match": sent.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (await asking.get("/page/../site.py")).status_code == 404
        assert (await asking.get("/page/index.html")).status_code == 404
        assert (await asking.post("/")).status_code == 404


async def test_the_state_says_who_serves_what_and_why_a_peer_is_trusted(open_site: OpenSite) -> None:
    async with open_site() as (asking, client):
        client.ledger.ban("b", why="it lied")
        state = (await asking.get(STATE)).json()
        swarm, trust = state["swarm"], state["trust"]
        assert {peer["peer_id"]: tuple(peer["blocks"]) for peer in swarm["peers"]} == {
            "a": (0, 5),
            "b": (5, 8),
        }
        assert swarm["missing"] == []
        assert [trust[peer]["banned"] for peer in "ab"] == [False, True]
        assert any("it lied" in sentence for sentence in trust["b"]["why"])


async def test_bans_are_told_with_their_proofs_also_of_peers_that_are_gone(open_site: OpenSite) -> None:
    async with open_site() as (asking, client):
        client.ledger.ban("b", why="it lied", now=1.0)
        client.ledger.add_proof("p1", "gone", 2.0, verified=True, sender="witness", why="blocks 3:5 differ")
        client.ledger.add_proof("p2", "gone", 3.0, verified=True)
        gone, mine = (await asking.get(STATE)).json()["bans"]
        assert (gone["peer_id"], gone["by"]) == ("gone", "proof")
        assert "blocks 3:5 differ" in gone["why"]
        assert [(each["address"], each["sender"], each["state"]) for each in gone["proofs"]] == [
            ("p1", "witness", "verified"),
            ("p2", "", "verified"),
        ]
        assert (mine["peer_id"], mine["by"], mine["why"], mine["proofs"]) == ("b", "user", "it lied", [])


async def test_bans_of_this_computer_are_told_beside_a_ledger_in_memory(
    open_site: OpenSite,
) -> None:
    """As in a swarm of our own nodes, whose ledger begins anew."""
    kept = Ledger()
    kept.ban("gone", why="it lied", now=1.0)
    async with open_site(kept=kept) as (asking, client):
        client.ledger.ban("b", why="it lied here", now=2.0)
        bans = (await asking.get(STATE)).json()["bans"]
        assert [(each["peer_id"], each["why"]) for each in bans] == [
            ("b", "it lied here"),
            ("gone", "it lied"),
        ]


async def test_the_state_is_that_of_the_model_which_is_asked_for(open_site: OpenSite) -> None:
    async with open_site() as (asking, client):
        state = (await asking.get(STATE, params={"model": client.spec.model})).json()
        assert (state["models"], state["swarm"]["model"]) == ([client.spec.model], client.spec.model)
        refused = await asking.get(STATE, params={"model": "poet"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


async def test_trainings_of_this_computer_are_told(open_site: OpenSite, tmp_path: Path) -> None:
    async with open_site() as (asking, _):
        assert (await asking.get(TRAININGS)).json() == {"trainings": []}
        async with noted_training(tmp_path, "stories", "tiny-stories") as board:
            board.show(1, 2, [3.0], 100.0, 4.0)
        (told,) = (await asking.get(TRAININGS)).json()["trainings"]
        assert (told["name"], told["state"], told["losses"]) == ("stories", "interrupted", [[1.0, 3.0]])


async def test_the_state_names_blocks_that_nobody_serves(open_site: OpenSite) -> None:
    async with open_site(alone=True) as (asking, _):
        assert (await asking.get(STATE)).json()["swarm"]["missing"] == [[5, 8]]


async def test_events_tell_of_a_text_along_its_route(open_site: OpenSite) -> None:
    heard: list[dict[str, Any]] = []
    async with open_site() as (asking, _), trio.open_nursery() as nursery:

        async def follow(task_status: trio.TaskStatus[None]) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", asking.base_url.port or 0)
            async with stream:
                await stream.send_all(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % EVENTS.encode())
                unread = b""
                async for received in stream:
                    *lines, unread = (unread + received).split(b"\n")
                    if any(line.startswith(b": ") for line in lines):
                        task_status.started()
                    heard.extend(json.loads(line[6:]) for line in lines if line.startswith(b"data: "))
                    if heard and heard[-1]["event"] == "session_ended":
                        return

        await nursery.start(follow)
        asked = {"model": "tiny-stories", "prompt": "Once upon a time", "max_tokens": 5}
        answered = await asking.post("/v1/completions", json=asked, timeout=60)
        assert answered.status_code == 200, answered.text
    assert heard[0]["event"] == "session_started"
    assert [hop["peer_id"] for hop in heard[0]["route"]] == ["a", "b"]
    steps = [event for event in heard if event["event"] == "step_done"]
    assert steps
    assert all(len(step["per_hop_ms"]) == 2 for step in steps)


async def test_a_server_with_keys_shows_its_page_and_tells_nobody_else_more(
    open_site: OpenSite,
) -> None:
    async with open_site(KEY) as (asking, _):
        assert (await asking.get("/")).status_code == 200
        for path in (STATE, EVENTS, TRAININGS):
            assert (await asking.get(path)).status_code == 401
        told = await asking.get(STATE, headers={"Authorization": f"Bearer {KEY}"})
        assert told.status_code == 200


async def test_a_page_of_another_site_learns_nothing(open_site: OpenSite) -> None:
    async with open_site() as (asking, _):
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            for path in ("/", STATE, EVENTS, TRAININGS):
                assert (await asking.get(path, headers=headers)).status_code == 403
