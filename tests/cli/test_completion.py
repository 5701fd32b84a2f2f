"""Completion in the shells themselves, where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# What each shell does when Tab is pressed behind `p2pinfer gen`. zsh's display needs a terminal, so what it
# would be given is printed instead.
ASK = {
    "bash": """
        eval "$(p2pinfer completion bash)"
        COMP_WORDS=(p2pinfer gen) COMP_CWORD=1
        "$(complete -p p2pinfer | sed -E 's/.*-F (\\S+).*/\\1/')" p2pinfer
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": """
        p2pinfer completion fish | source
        complete -C 'p2pinfer gen'
    """,
    "zsh": """
        autoload -U compinit && compinit -u -d "$HOME/dump"
        eval "$(p2pinfer completion zsh)"
        test "$_comps[p2pinfer]" || exit 1
        compadd() { print -l -- $completions }
        _describe() { print -l -- $completions_with_descriptions }
        words=(p2pinfer gen) CURRENT=2
        $_comps[p2pinfer] p2pinfer
    """,
}
QUIET = {"bash": ["--norc", "--noprofile"], "fish": ["--no-config"], "zsh": ["--no-rcs"]}


@pytest.mark.parametrize("shell", ASK)
def test_a_command_is_completed(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "p2pinfer").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m p2pinfer "$@"\n')
    (tmp_path / "p2pinfer").chmod(0o755)
    done = subprocess.run(
        [program, *QUIET[shell], "-c", ASK[shell]],
        env={**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert "generate" in done.stdout, done.stderr
    assert "node" not in done.stdout
