"""Where an answer came from, and what audits have found: the field `p2pinfer`, in every dialect."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from p2pinfer.audit.tally import AuditTally
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from .scripted import serve_script

QUESTION = [{"role": "user", "content": "Hello"}]
WISHES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": QUESTION},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 50},
    "/api/chat": {"messages": QUESTION},
    "/api/generate": {"prompt": "Hello"},
}


def last_told(text: str) -> dict[str, Any]:
    """The last report in a stream of events or lines."""
    lines = [line.removeprefix("data: ") for line in text.splitlines()]
    told = [json.loads(line) for line in lines if '"p2pinfer"' in line][-1]
    report: dict[str, Any] = told["p2pinfer"] if "p2pinfer" in told else told["response"]["p2pinfer"]
    return report


@pytest.mark.parametrize("path", WISHES)
async def test_an_answer_tells_its_origin_whole_and_as_a_stream(checkpoint: Checkpoint, path: str) -> None:
    async with serve_script(checkpoint, "Hi there.") as (url, script):
        script.audits = AuditTally(done=3, passed=2, failed=1)
        wish = WISHES[path] | {"model": "tiny-stories"}
        async with httpx.AsyncClient(base_url=url) as asking:
            whole = (await asking.post(path, json=wish | {"stream": False})).raise_for_status().json()
            stream = (await asking.post(path, json=wish | {"stream": True})).raise_for_status().text
    for report in (whole["p2pinfer"], last_told(stream)):
        assert report["audits"] == {"done": 3, "passed": 2, "failed": 1, "suspect": 0, "inconclusive": 0}
        assert report["failovers"] == 0
        assert {"route", "per_hop_ms", "first_token_s", "tokens_per_s", "seed"} < report.keys()
