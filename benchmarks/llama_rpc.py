"""Tokens a second of llama.cpp's RPC over the hosts and lines of distance.py.

    pip download --no-deps --no-binary :all: llama-cpp-python     # its sdist holds the source of llama.cpp
    cmake -S vendor/llama.cpp -B build -DGGML_RPC=ON -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF
    cmake --build build --target llama-bench ggml-rpc-server
    python benchmarks/llama_rpc.py --binaries build/bin --hops 4 --delay 50 --mbit 100

The model is that of distance.py, as a GGUF file in float32. Every host runs a server with one thread, and the
client `llama-bench`, which spreads the blocks over all of them. It loads the weights over lines without
limits, which takes minutes over those that are measured, and generates `tokens` tokens behind an empty
prompt, twice for each line: the first time is thrown away, since the line changes while it begins. `bound`
is that of distance.py without compute: (hops + 1) delays, and rows over the uplink as often.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the lab, which belongs to the tests
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

from contest import model_folder, report
from distance import QUEUE_MS

from tests.lab.lab import Lab, open_lab
from tests.lab.namespaces import why_not
from tests.lab.scenario import Line, Scenario, Site
from tests.models.checkpoint.gguf_writer import write_gguf

PORT: Final = 50052
FAST: Final = Line(0, 0, up_mbit=10_000, down_mbit=10_000, queue_ms=QUEUE_MS)


def measure(options: argparse.Namespace, gguf: Path, width: int, hops: int) -> Iterator[dict[str, Any]]:
    """The rows of one model over so many servers."""
    hosts = [f"n{number}" for number in range(hops)]
    scenario = Scenario("llama rpc", "public hosts", tuple(Site(host) for host in (*hosts, "me")))
    with open_lab(scenario) as lab:
        set_lines(lab, FAST)
        for host in hosts:
            server = [str(options.binaries / "ggml-rpc-server"), "-H", "0.0.0.0", "-p", str(PORT), "-t", "1"]
            lab.popen(host, server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0)
        cells = list(product(options.delay, options.mbit))
        seconds = run_bench(options, lab, gguf, hosts, cells)
        for (delay_ms, mbit), taken_s in zip(cells, seconds, strict=True):
            row_s = width * 4 * 8 / (mbit * 1e6)
            yield {
                "model": options.model,
                "hops": hops,
                "delay": delay_ms,
                "mbit": mbit,
                "way ms": round((hops + 1) * (delay_ms + row_s * 1e3), 1),
                "tok/s": round(options.tokens / taken_s, 2),
                "load": round(os.getloadavg()[0], 1),
            }


def run_bench(
    options: argparse.Namespace,
    lab: Lab,
    gguf: Path,
    hosts: Sequence[str],
    cells: Sequence[tuple[float, float]],
) -> list[float]:
    """Seconds of one run over each line, of delay and uplink, by a client that loads the weights once."""
    servers = ",".join(f"{lab.scenario.public_ipv4(host)}:{PORT}" for host in hosts)
    runs = ("-p", "0", "-n", str(options.tokens), "-r", str(2 * len(cells)))
    how = ("-t", "1", "-ngl", "99", "-o", "json", "--progress")
    bench = [str(options.binaries / "llama-bench"), "-m", str(gguf), "-rpc", servers, *runs, *how]
    with tempfile.TemporaryFile("w+") as out:
        client = lab.popen("me", bench, stdout=out, stderr=subprocess.PIPE)
        assert client.stderr is not None
        said: list[str] = []
        for text in client.stderr:
            said.append(text)
            if "generation run" in text and "/" in text.rpartition("run")[2]:
                number = int(text.rpartition("run")[2].partition("/")[0]) - 1
                if number % 2 == 0:
                    delay_ms, mbit = cells[number // 2]
                    line = Line(delay_ms / 2, 0, up_mbit=mbit, down_mbit=1000, queue_ms=QUEUE_MS)
                    set_lines(lab, line)
        if client.wait() != 0:
            sys.exit("".join(said[-5:]))
        out.seek(0)
        samples: list[int] = json.load(out)[0]["samples_ns"]
    return [each / 1e9 for each in samples[1::2]]


def set_lines(lab: Lab, line: Line) -> None:
    """Give every host that line."""
    for host in lab.scenario.hosts:
        lab.set_line(host, line)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="folder of llama-bench and its server")
    parser.add_argument("--model", default="1024x16")
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--delay", nargs="+", type=float, default=[0.0, 10.0, 25.0, 50.0, 115.0])
    parser.add_argument("--mbit", nargs="+", type=float, default=[100.0])
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args(argv)
    options.binaries = options.binaries.resolve()
    if lacking := why_not():
        sys.exit(lacking)
    started, rows = time.monotonic(), list[dict[str, Any]]()
    with model_folder(options.model) as folder, tempfile.TemporaryDirectory() as made:
        config = json.loads((folder / "config.json").read_text())
        gguf = Path(made, "model.gguf")
        # Of no use to the benchmark, and llama.cpp wants to know that there is none.
        no_tokenizer = {"tokenizer__ggml__model": "no_vocab", "llama__vocab_size": config["vocab_size"]}
        head = config["hidden_size"] // config["num_attention_heads"]
        write_gguf(folder, gguf, {}, **no_tokenizer, llama__rope__dimension_count=head)
        for hops in options.hops:
            for row in measure(options, gguf, config["hidden_size"], hops):
                rows.append(row)
                print(*(f"{key} {value}" for key, value in row.items()), file=sys.stderr, sep="  ")
    report(f"llama.cpp's RPC, {options.tokens} tokens, {time.monotonic() - started:.0f} s in all", rows)


if __name__ == "__main__":
    main()
