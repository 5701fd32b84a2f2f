from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import msgspec

from p2pinfer.audit.auditor import AuditTally
from p2pinfer.generation.generation import GenerationResult, Timings
from p2pinfer.generation.remote_blocks import HopUsed
from p2pinfer.generation.speculation import SpeculationStats
from p2pinfer.json_documents import (
    AllModelsDocument,
    ResultDocument,
    SwarmDocument,
    all_models_document,
    result_document,
    swarm_document,
    to_json,
)
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.announcement import Announcement
from p2pinfer.served import ServedModel
from p2pinfer.swarm_view import AllModels, PeerView, State, SwarmView

MODEL = ServedModel("tiny", "ab" * 16, 8, ())


def peer(
    peer_id: str,
    span: BlockSpan,
    connection: Literal["direct", "relayed"] | None = None,
    rtt_ms: float | None = None,
    state: State = "answers",
) -> PeerView:
    said = Announcement(peer_id, "tiny", MODEL.revision, span, "bfloat16", 1234.5, 65536, 1)
    return PeerView(said, connection, rtt_ms, state)


def test_the_json_of_a_swarm_has_these_keys() -> None:
    silent = peer("silent", BlockSpan(4, 7), state="unknown")
    view = SwarmView(MODEL, (peer("first", BlockSpan(0, 5), "direct", 1.25), silent))
    told = json.loads(to_json(swarm_document(view)))
    assert told == {
        "model": "tiny",
        "revision": "ab" * 16,
        "num_blocks": 8,
        "missing": [[5, 8]],
        "unknown": [[5, 7]],
        "peers": [
            {
                "peer_id": "first",
                "blocks": [0, 5],
                "dtype": "bfloat16",
                "tokens_per_s": 1234.5,
                "free_cache_tokens": 65536,
                "reachability": "unknown",
                "addrs": [],
                "connection": "direct",
                "rtt_ms": 1.25,
                "state": "answers",
                "name": "",
            },
            {
                "peer_id": "silent",
                "blocks": [4, 7],
                "dtype": "bfloat16",
                "tokens_per_s": 1234.5,
                "free_cache_tokens": 65536,
                "reachability": "unknown",
                "addrs": [],
                "connection": None,
                "rtt_ms": None,
                "state": "unknown",
                "name": "",
            },
        ],
    }


def test_the_json_of_all_models_tells_the_usual_one_as_if_asked_for() -> None:
    usual = SwarmView(MODEL, ())
    other = SwarmView(replace(MODEL, model="other"), (peer("p", BlockSpan(0, 8)),))
    line = to_json(all_models_document(AllModels(usual, (other,))))
    told = json.loads(line)
    assert told["models"] == [json.loads(to_json(swarm_document(other)))]
    assert {**told, "models": []} == {**json.loads(to_json(swarm_document(usual))), "models": []}
    assert to_json(msgspec.json.decode(line, type=AllModelsDocument)) == line


def test_the_json_of_a_result_has_these_keys_and_only_ascii() -> None:
    ledger = Ledger()
    route = (HopUsed("peer", BlockSpan(0, 8), "relayed"),)
    timings = Timings(0.5, 20.0, (1.5,), 3.0, 21.5)
    result = GenerationResult(
        "déjà ✓", (1, 2), 3, "length", route, timings, 1, 7, SpeculationStats(1.5, 4, 1, ((2, 1),), 1.25)
    )
    line = to_json(result_document(result, ledger, AuditTally(done=1, passed=1), "token"))
    assert line.isascii()
    score = ledger.score("peer")
    assert json.loads(line) == {
        "text": "déjà ✓",
        "token_ids": [1, 2],
        "prompt_tokens": 3,
        "finish_reason": "length",
        "route": [
            {
                "peer_id": "peer",
                "blocks": [0, 8],
                "connection": "relayed",
                "integrity": round(score.integrity, 3),
                "reliability": round(score.reliability, 3),
            }
        ],
        "timings": {
            "first_token_s": 0.5,
            "tokens_per_s": 20.0,
            "per_hop_ms": [1.5],
            "predicted_tokens_per_s": 21.5,
        },
        "failovers": 1,
        "seed": 7,
        "audits": {"done": 1, "passed": 1, "failed": 0, "suspect": 0, "inconclusive": 0},
        "resume_token": "token",
        "speculation": {
            "tokens_per_trip": 1.5,
            "drafted": 4,
            "accepted": 1,
            "by_depth": [[2, 1]],
            "in_flight": 1.25,
            "predicted_tokens_per_s": 21.5,
        },
        "packed_tokens": 0,
    }
    assert to_json(msgspec.json.decode(line, type=ResultDocument)) == line


def test_what_a_page_reads_is_typed() -> None:
    view = SwarmView(MODEL, (peer("first", BlockSpan(0, 5)),))
    document = msgspec.json.decode(to_json(swarm_document(view)), type=SwarmDocument)
    assert document == swarm_document(view)
    assert document.peers[0].blocks == (0, 5)


def test_a_swarm_is_looked_at_without_torch() -> None:
    script = "import sys, p2pinfer.json_documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
