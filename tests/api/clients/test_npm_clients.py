"""npm's openai, npm's ollama and the AI SDK against a real `p2pinfer serve`.

`make clients` fetches them. What each cannot do is in docs/doors.md.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ...npm_packages import CannotRun, installed
from .conftest import Serving

HERE = Path(__file__).parent
OLDEST_NODE = 22  # that openai and ai want
FEATURES = {
    "openai": ("models", "chat", "stream", "stop", "tools", "schema", "logprobs", "several", "errors"),
    "ai_sdk": ("chat", "stream", "stop", "tools", "schema", "logprobs", "several", "errors"),
    "ollama": ("models", "chat", "stream", "stop", "tools", "schema", "logprobs", "errors"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node() -> tuple[Path, str]:
    """Folder of the packages, and the node that runs them."""
    try:
        return installed(HERE, OLDEST_NODE, fetch=False)
    except CannotRun as exc:
        pytest.skip(f"npm's clients: {exc}; `make clients` fetches them")


@pytest.mark.parametrize("client", FEATURES)
def test_what_it_asks_for_it_gets(client: str, node: tuple[Path, str], serving: Serving) -> None:
    folder, program = node
    ports = ",".join(map(str, serving.metrics))
    argv = [program, f"{client}.mjs", serving.url, serving.key, ports]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = {each["feature"]: each["fault"] for each in map(json.loads, done.stdout.splitlines())}
    assert set(told) == set(FEATURES[client])
    faults = {feature: fault for feature, fault in told.items() if fault is not None}
    assert not faults, "\n".join(f"{feature}: {fault}" for feature, fault in faults.items())
