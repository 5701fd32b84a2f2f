"""What libp2p logs."""

from __future__ import annotations

import logging

import pytest

from p2pinfer.node.host.library_logs import adopt_libp2p_logs


def test_an_error_of_libp2ps_is_a_detail_of_ours_and_is_said_once(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = logging.getLogger("libp2p")
    monkeypatch.setattr(theirs, "propagate", False)  # as libp2p has it
    adopt_libp2p_logs()
    adopt_libp2p_logs()
    with caplog.at_level(logging.DEBUG, "p2pinfer"):
        logging.getLogger("libp2p.network.swarm").error("peer %s hung up", "X")
    [ours] = [record for record in caplog.records if record.name == "p2pinfer.libp2p"]
    assert (ours.levelno, ours.getMessage()) == (logging.DEBUG, "libp2p.network.swarm: peer X hung up")
    assert capfd.readouterr().err == ""
