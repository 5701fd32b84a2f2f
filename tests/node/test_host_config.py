"""Settings of a host that make no sense."""

from __future__ import annotations

import pytest

from p2pinfer.node.host_config import HostConfig


@pytest.mark.parametrize(
    "build",
    [
        lambda: HostConfig(dial_timeout_s=0.0),
        lambda: HostConfig(stream_timeout_s=-1.0),
        lambda: HostConfig(max_connections=0),
        lambda: HostConfig(dial_stagger_s=-0.1),
        lambda: HostConfig(max_streams_per_peer=0),
    ],
)
def test_nonsense_is_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match="must"):
        build()
