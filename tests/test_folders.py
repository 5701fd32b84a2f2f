"""Where things are kept by a user without a home."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs
import pytest

from p2pinfer.config import SharedConfig, load_settings
from p2pinfer.errors import ConfigError
from p2pinfer.folders import data_folder, expand, is_homeless


@pytest.fixture(params=["raises", "returns a tilde"])
def homeless(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of a user for whom platformdirs, older or newer, finds no home."""

    def nowhere(name: str) -> str:
        if request.param == "raises":
            raise RuntimeError("could not determine the home directory")
        return f"~/.local/share/{name}"

    for kind in ("data", "config", "cache"):
        monkeypatch.setattr(platformdirs, f"user_{kind}_dir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"p2pinfer-{os.getuid()}"


def test_whoever_has_a_home_keeps_things_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "p2pinfer"
    assert not is_homeless()


def test_without_a_home_it_is_a_folder_of_ones_own(homeless: Path) -> None:
    assert is_homeless()
    shared = load_settings(environ={}).build(SharedConfig)
    assert (shared.data_dir, shared.cache_dir) == (homeless / "data", homeless / "cache")
    assert homeless.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_a_folder_that_others_may_have_prepared_is_not_used(homeless: Path, trap: str) -> None:
    """They could put a config.toml there that names a policy, which is code."""
    if trap == "open to others":
        homeless.mkdir()
        homeless.chmod(0o777)
    elif trap == "a link":
        (homeless.parent / "theirs").mkdir(mode=0o700)
        homeless.symlink_to(homeless.parent / "theirs")
    else:
        homeless.touch()
    with pytest.raises(ConfigError, match=r"no home directory, and .* set HOME"):
        data_folder()


def test_nowhere_to_make_it_is_said(homeless: Path) -> None:
    homeless.parent.rmdir()
    with pytest.raises(ConfigError, match=r"cannot be made \(No such file or directory\); set HOME"):
        data_folder()


def test_a_tilde_of_nobody_is_said() -> None:
    assert expand("~/models") == Path.home() / "models"
    with pytest.raises(ConfigError, match="~nobody-here is not the home directory of a known user"):
        expand("~nobody-here/models")
