"""Ten minutes of schemathesis against `p2pinfer serve`, by docs/openapi.json.

    python scripts/fuzz_http.py [SECONDS]

Fails if any answer is a 5xx, if the server writes a traceback, or if it keeps connections or files open.
schemathesis is looked for as `st` beside this Python, or where SCHEMATHESIS says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
CHECKS = "not_a_server_error"
SETTLE_S = 3.0


def described(model: str) -> dict[str, Any]:
    """The description, narrowed so that many requests are such as are answered, and in a few tokens."""
    document = json.loads((ROOT / "docs" / "openapi.json").read_text("utf-8"))
    narrowed: dict[str, Any] = {
        "model": {"enum": [model, f"{model}:latest"]},
        "name": {"enum": [model]},
        "num_predict": {"type": "integer", "maximum": 4},
    }
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "messages" in properties or "prompt" in properties or schema.get("title") == "ShowRequest":
            properties.update({name: narrowed[name] for name in narrowed if name in properties})
    return document


def fuzz(seconds: int, home: Path) -> int:
    """Run it; returns the exit code."""
    command = [sys.executable, "-m", "p2pinfer", "serve", "--json", "--port", "0", "--data-dir", str(home)]
    command += ["--set", "api.max_new_tokens=4", "--set", "audit.rate=0.0", "--set", "host.mdns=false"]
    log = home / "log"
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as server:
        try:
            assert server.stdout is not None
            told = json.loads(server.stdout.readline())
            description = home / "openapi.json"
            description.write_text(json.dumps(described(told["model"])), "utf-8")
            process = psutil.Process(server.pid)
            files = process.num_fds()
            tool = os.environ.get("SCHEMATHESIS", str(Path(sys.executable).with_name("st")))
            asked = [tool, "run", str(description), "--url", told["urls"][0], "--checks", CHECKS]
            asked += ["--max-time", str(seconds), "--max-examples", "100000", "--continue-on-failure"]
            asked += ["--warnings", "off", "--suppress-health-check", "all"]
            result = subprocess.run(asked, cwd=home).returncode
            time.sleep(SETTLE_S)
            left = process.num_fds() - files
        finally:
            server.terminate()
    said = log.read_text("utf-8", "replace")
    print(f"schemathesis ended with {result}; {left} more files and sockets are open than before")
    if "Traceback" in said:
        print(said[-4000:])
    return int(result != 0 or left > 8 or "Traceback" in said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 600, Path(folder)))
