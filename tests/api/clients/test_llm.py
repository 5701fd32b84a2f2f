"""The command `llm` against a real `p2pinfer serve`. `make clients` installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .conftest import Serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm") is None, reason="llm; see `make clients`"),
]

PROMPT = "Once upon a time"
TEXT = ", there was a little girl named Lily. She loved to play"
SCHEMA = {
    "type": "object",
    "properties": {"hero": {"enum": ["girl", "dog"]}},
    "required": ["hero"],
    "additionalProperties": False,
}
MODELS = """
- model_id: here
  model_name: tiny-chat
  api_base: {url}/v1
  api_key_name: here
  supports_tools: true
  supports_schema: true
- model_id: texts
  model_name: tiny-chat
  api_base: {url}/v1
  api_key_name: here
  completion: true
- model_id: gone
  model_name: gpt-5
  api_base: {url}/v1
  api_key_name: here
"""


@pytest.fixture(scope="module")
def home(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder of settings."""
    made = tmp_path_factory.mktemp("llm")
    (made / "extra-openai-models.yaml").write_text(MODELS.format(url=serving.url), encoding="utf-8")
    (made / "keys.json").write_text(json.dumps({"here": serving.key}), encoding="utf-8")
    return made


def run(home: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llm", *argv],
        env={**os.environ, "LLM_USER_PATH": str(home), **environ},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def said(home: Path, *argv: str) -> str:
    done = run(home, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_texts_are_continued_whole_and_in_pieces(home: Path) -> None:
    limit = ("-o", "max_tokens", "13")
    assert said(home, "-m", "here", *limit, PROMPT) == TEXT
    assert said(home, "-m", "here", "--no-stream", *limit, PROMPT) == TEXT
    assert said(home, "-m", "texts", *limit, "-o", "temperature", "0", PROMPT) == TEXT
    logged = json.loads(said(home, "logs", "--json", "-n", "1"))
    assert logged[0]["response"] == TEXT


def test_it_stops_early(home: Path, serving: Serving) -> None:
    assert said(home, "-m", "here", "-o", "stop", " named", PROMPT) == ", there was a little girl"
    argv = [sys.executable, "-W", "ignore", "-m", "llm", "-m", "here", "-o", "max_tokens", "900", PROMPT]
    environ = {**os.environ, "LLM_USER_PATH": str(home), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.terminate()
        process.stdout.close()
    serving.wait_until_nobody_is_served()


def test_tools_and_forms(home: Path) -> None:
    schema = json.dumps(SCHEMA)
    written = json.loads(said(home, "-m", "here", "-o", "max_tokens", "250", "--schema", schema, PROMPT))
    assert written["hero"] in ("girl", "dog")
    with_tool = said(home, "-m", "here", "-o", "max_tokens", "13", "-T", "llm_version", PROMPT)
    assert with_tool  # nothing in it asks for a call, and this model makes none by itself


def test_errors_are_told(home: Path) -> None:
    gone = run(home, "-m", "gone", PROMPT)
    assert gone.returncode == 1
    assert "'gpt-5' is not served here" in gone.stderr
    refused = run(home, "-m", "here", "-o", "presence_penalty", "1", PROMPT)
    assert refused.returncode == 1
    assert "presence_penalty is not supported: use repetition_penalty" in refused.stderr
    assert "Traceback" not in gone.stderr + refused.stderr
    (home / "keys.json").write_text('{"here": "another"}', encoding="utf-8")
    assert "API key is missing or wrong" in run(home, "-m", "here", PROMPT).stderr
