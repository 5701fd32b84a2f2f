"""The port of last time."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from p2pinfer.node.host.last_ports import FILE_NAME, remember_ports, with_last_ports

from ...ports import free_port

ANY = "/ip4/127.0.0.1/tcp/0"


def test_a_free_port_is_taken_again_where_any_would_do(tmp_path: Path) -> None:
    port = free_port()
    assert with_last_ports([ANY], tmp_path) == (ANY,)
    remember_ports(tmp_path, [f"/ip4/127.0.0.1/tcp/{port}"])
    assert with_last_ports([ANY], tmp_path) == (f"/ip4/127.0.0.1/tcp/{port}",)
    assert with_last_ports([ANY, "/ip4/127.0.0.2/tcp/0"], tmp_path)[1] == "/ip4/127.0.0.2/tcp/0"
    assert with_last_ports(["/ip4/127.0.0.1/tcp/4001"], tmp_path) == ("/ip4/127.0.0.1/tcp/4001",)


def test_a_port_that_another_has_meanwhile_is_said_and_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        remember_ports(tmp_path, [f"/ip4/127.0.0.1/tcp/{port}"])
        assert with_last_ports([ANY], tmp_path) == (ANY,)
    assert f"/ip4/127.0.0.1/tcp/{port}: the port is taken" in caplog.text
    assert "takes another one" in caplog.text


def test_what_is_remembered_of_one_place_outlives_another(tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    remember_ports(tmp_path, [f"/ip4/127.0.0.1/tcp/{first}"])
    remember_ports(tmp_path, [f"/ip4/127.0.0.2/tcp/{second}"])
    assert with_last_ports([ANY], tmp_path) == (f"/ip4/127.0.0.1/tcp/{first}",)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"/ip4/127.0.0.1": "x"}', '{"/ip4/127.0.0.1": 70000}', '{"/ip4/127.0.0.1": -1}'],
)
def test_a_damaged_note_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    assert with_last_ports([ANY], tmp_path) == (ANY,)


def test_nonsense_to_listen_on_is_left_for_who_opens_it(tmp_path: Path) -> None:
    assert with_last_ports(["nonsense"], tmp_path) == ("nonsense",)


def test_a_folder_that_cannot_be_written_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    remember_ports(tmp_path / "file" / "below", [ANY.replace("/0", "/4001")])
    assert "cannot save the listening ports" in caplog.text
