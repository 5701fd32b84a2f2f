"""Tokens a second where hops are far apart, against the physical bound: plain decoding and speculative.

    python benchmarks/distance.py                                    # the whole plan, hours
    python benchmarks/distance.py --brief                            # a part of each, eight minutes
    python benchmarks/distance.py --model tiny-stories --hops 4 --delay 50 --mbit 100 --rounds 1
    python benchmarks/distance.py --model smollm2 --hops 4 --delay 50 --mbit 100 --kind copy --thin

Hosts, lines and delays are those of the lab (tests/lab: network namespaces, so Linux and root or user
namespaces). Nodes and client are the commands that a user types, all public, one torch thread each. `delay`
is one way between any two hosts, `mbit` every host's uplink.

`bound` is 1 / (compute + (hops + 1) delay + (hops + 1) hidden bytes / uplink), where compute is what local
transformers takes for a token of the same text, in the same run and with one thread. A chain without guesses
cannot be faster by more than it computes faster. `of bound` is plain over bound. `gain` is the median over
rounds of speculated over plain, which take turns.

Texts by kind: a story, greedy and sampled; a dialogue that repeats itself, which the story model does not go
on to quote; `copy`, a passage that is begun again; and for a model that was tuned for chats a question, code
that is to be given out again with a change, and facts that are to be written as JSON. A greedy story of a
small model ends in a loop, where guessing is easy: `loop at` is the token from which on a text repeats what
came just before, and a text is stopped there where one of an earlier run is known (`--until-loop`). With
`--thin`, a client without weights takes its turn as well, with guesses. With `--clients N`, so many plain
ones generate at once, and `together` is the sum of their tokens a second over that of one.

`same ids` compares all runs with each other, and `as local` with transformers, where it is greedy. With
`--dtype bfloat16`, `near ties` counts the tokens that were less than 0.05 likelier than the second likeliest,
and `differs at` is the margin at the first token that differs between runs. `predicted` is what the client
expected of the speculated runs, and `missed by` the median of how far each run was from what it expected.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the lab, which belongs to the tests
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # oneDNN reads it once, here and in the nodes

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import median
from typing import Any, Final

import torch
from contest import Local, blocks_of, evenly, model_folder, report, rounded

from p2pinfer.models.text.text import load_tokenizer
from tests.lab.commands import Command, Commands, open_commands
from tests.lab.lab import open_lab
from tests.lab.namespaces import environ, why_not
from tests.lab.pairs import leave, reachable
from tests.lab.pinned import POLICY, VARIABLE, write_routes
from tests.lab.scenario import Line, Scenario, Site

MODELS: Final = ("tiny-stories", "smollm2", "1024x16")
DELAYS_MS: Final = (0.0, 10.0, 25.0, 50.0, 115.0)
UPLINKS_MBIT: Final = (20.0, 100.0)
QUEUE_MS: Final = 300.0
STORY: Final = "Once upon a time, there was a little fox who lived in a big forest. One day, the fox"
QUOTED: Final = (
    "Tom said: I like my red ball, my blue kite and my green boat. Mia said: I like my old bear, my small "
    "drum and my big book. Tom said: I like my red ball, my blue kite and my green boat. Mia said: I like my"
)
PASSAGE: Final = (
    "The museum of the small town has four rooms. In the first one there are stones and shells from the "
    "lake. The second room shows how people made bread two hundred years ago, with an old oven and a mill. "
    "In the third room there are pictures of the town before the railway came, and a map from 1841. The last "
    "room is empty, because nobody knows what to put into it. Visitors may write their ideas on a card and "
    "leave it in a box."
)
COPIED: Final = f"{PASSAGE}\n\n{PASSAGE}\n\nThe museum of the small town has"
CODE: Final = """def total(prices, discount):
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError("a price is negative")
        result = result + price * (1 - discount)
    return result
"""
PLACES: Final = (
    "Anna Berger, 34, lives in Linz and works as a nurse. Paul Roth, 51, lives in Bern and works as a baker. "
    "Mia Svensson, 27, lives in Malmo and works as a pilot."
)


def _chat(text: str) -> str:
    """Prompt for a model with SmolLM2's chat template."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = (("system", system), ("user", text))
    turns = "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in said)
    return turns + "<|im_start|>assistant\n"


PROMPTS: Final = {
    "story": STORY,
    "sampled": STORY,
    "quote": QUOTED,
    "copy": COPIED,
    "chat": _chat("How do I keep bread fresh for some days, and why does it become hard?"),
    "code": _chat(f"Change this function so that it also prints each price. Print all of it.\n\n{CODE}"),
    "extract": _chat(f"Write the persons as a JSON list with name, age, city and job.\n\n{PLACES}"),
}
KINDS: Final = {"smollm2": ("chat", "code", "extract", "copy", "sampled"), "1024x16": ("story",)}
STORY_KINDS: Final = ("story", "sampled")
SAMPLED: Final = ("--temperature", "0.7", "--seed", "5")
NEAR: Final = 0.05  # of probability, between the two likeliest tokens
BRIEF_TOKENS: Final = 48
# Model, hops, delay, uplink, kind; each takes about half a minute.
BRIEF: Final = (
    ("tiny-stories", 4, 0.0, 100.0, "story"),
    ("tiny-stories", 4, 10.0, 100.0, "story"),
    ("tiny-stories", 4, 50.0, 100.0, "story"),
    ("tiny-stories", 4, 50.0, 100.0, "sampled"),
    ("tiny-stories", 2, 25.0, 100.0, "story"),
    ("tiny-stories", 1, 50.0, 100.0, "story"),
    ("smollm2", 4, 50.0, 100.0, "copy"),
    ("smollm2", 4, 50.0, 100.0, "code"),
    ("smollm2", 4, 50.0, 100.0, "chat"),
    ("1024x16", 4, 50.0, 100.0, "story"),
)
PATIENCE_S: Final = 300.0
LEAST_TOKENS: Final = 16  # of a text that is stopped before it loops


@dataclass(frozen=True, slots=True)
class Run:
    """One generation, as its JSON tells it."""

    token_ids: tuple[int, ...]
    tokens_per_s: float
    first_token_s: float
    tokens_per_trip: float
    in_flight: float
    predicted: float | None


class Chain:
    """Nodes in a lab, a span each, and a client that goes through all of them."""

    def __init__(self, commands: Commands, folder: Path, dtype: str, hops: int) -> None:
        self._commands = commands
        self._model = ("--model", str(folder))
        self._dtype = dtype
        self._join: tuple[str, ...] = ()
        self.bootstrap = ""
        self.nodes: list[Command] = []
        spans = [str(span) for span in evenly(blocks_of(folder), hops)]
        for number, span in enumerate(spans):
            host = f"n{number}"
            listen = ("--listen", f"/ip4/{commands.lab.scenario.public_ipv4(host)}/tcp/4001")
            node = commands.node(host, *self._model, "--blocks", span, "--dtype", dtype, *listen, *self._join)
            self.nodes.append(node)
            self.bootstrap = node.event("ready", PATIENCE_S)["addrs"][0]
            self._join = ("--bootstrap", self.bootstrap)
        if hops == 1:  # alone, nobody could tell it how it is reached
            listen = ("--listen", f"/ip4/{commands.lab.scenario.public_ipv4('me')}/tcp/4001")
            commands.node("me", "--no-blocks", *listen, *self._join)
        peers = [reachable(node) for node in self.nodes]
        self.route = write_routes(list(zip(peers, spans, strict=True)))

    def set_lines(self, delay_ms: float, mbit: float) -> None:
        """Give every host a line of its own: so long one way between any two of them, so fast an uplink."""
        line = Line(delay_ms / 2, 0, up_mbit=mbit, down_mbit=1000, queue_ms=QUEUE_MS)
        for host in self._commands.lab.scenario.hosts:
            self._commands.lab.set_line(host, line)

    def ask_inside(self, script: str, *words: str, patience_s: float) -> Any:
        """What a script that runs in the client's host has as JSON in its last line.

        Raises:
            OSError: It failed.
            subprocess.TimeoutExpired: It takes longer.
        """
        lab = self._commands.lab
        folders = {"HOME": str(lab.home), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = lab.popen(
            "me",
            [sys.executable, str(Path(script).resolve()), *words],
            stdout=-1,
            env=environ(**{VARIABLE: self.route, **folders}),
        )
        out, _ = done.communicate(timeout=patience_s)
        if done.returncode:
            raise OSError("the client failed")
        return json.loads(out.splitlines()[-1])

    def generate(self, prompt: str, speculate: str, tokens: int, *more: str) -> Run:
        """One text, to its last token; greedy, unless `more` says otherwise.

        Raises:
            OSError: It failed.
        """
        return self.finish(self.begin(prompt, speculate, tokens, *more))

    def begin(self, prompt: str, speculate: str, tokens: int, *more: str) -> Command:
        """One text that is under way."""
        settings = ("client.dtype=" + self._dtype, "client.find_timeout_s=60")
        return self._commands.generate(
            "me",
            prompt,
            *(*self._model, *self._join, "--max-new-tokens", str(tokens)),
            *(() if "--temperature" in more else ("--temperature", "0")),
            *("--raw", "--speculate", speculate, "--policy", POLICY, "--audit-rate", "0", *more),
            *(word for setting in settings for word in ("--set", setting)),
            **{VARIABLE: self.route},
        )

    def finish(self, client: Command) -> Run:
        """What came of a text.

        Raises:
            OSError: It failed.
        """
        if client.wait(PATIENCE_S) != 0:
            raise OSError(client.err.strip().splitlines()[-1])
        told = json.loads(client.out)
        timings: dict[str, Any] = told["timings"]
        trips: dict[str, Any] = told.get("speculation") or {}
        return Run(
            tuple(told["token_ids"]),
            timings["tokens_per_s"],
            timings["first_token_s"],
            trips.get("tokens_per_trip", 1.0),
            trips.get("in_flight", 1.0),
            timings["predicted_tokens_per_s"],
        )


def measure(
    options: argparse.Namespace, name: str, hops: int, cells: Sequence[tuple[float, float, str]]
) -> Iterator[dict[str, Any]]:
    """The rows of one model over so many hops, for delays, uplinks and kinds of text."""
    hosts = (*(f"n{number}" for number in range(hops)), "me")
    scenario = Scenario("distance", "public hosts", tuple(Site(host) for host in hosts))
    with model_folder(name) as folder, open_lab(scenario) as lab, open_commands(lab) as commands:
        local = Local(folder, options.dtype, keep_margins=options.dtype != "float32")
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        row_bytes = width * torch.empty((), dtype=getattr(torch, options.dtype)).element_size()
        chain = Chain(commands, folder, options.dtype, hops)
        try:
            for delay_ms, mbit, kind in cells:
                chain.set_lines(delay_ms, mbit)
                trip_s = (hops + 1) * (delay_ms / 1e3 + row_bytes * 8 / (mbit * 1e6))
                cell = {"model": name, "hops": hops, "delay": delay_ms, "mbit": mbit, "kind": kind}
                yield cell | contest(chain, local, folder, kind, trip_s, options)
        finally:
            leave(chain.nodes)


def contest(
    chain: Chain, local: Local, folder: Path, kind: str, trip_s: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Plain and speculative decoding in turns, and what physics allows the former."""
    prompt, how = PROMPTS[kind], SAMPLED if kind == "sampled" else ()
    ids = load_tokenizer(folder).encode(prompt)
    tokens: int = options.tokens
    expected, times = local.generate(ids, tokens)
    if options.until_loop and kind != "sampled":
        tokens = max(LEAST_TOKENS, min(tokens, loop_begins(expected)))
    compute_s = median(after - before for before, after in pairwise(times))
    plain: list[Run] = []
    guessed: list[Run] = []
    thin: list[Run] = []
    for _ in range(options.rounds):
        plain.append(chain.generate(prompt, "off", tokens, *how))
        guessed.append(chain.generate(prompt, options.speculate, tokens, *how))
        if options.thin:
            thin.append(chain.generate(prompt, options.speculate, tokens, *how, "--thin"))
    crowd = [chain.begin(prompt, "off", tokens) for _ in range(options.clients)]
    together = sum(run.tokens_per_s for run in map(chain.finish, crowd))
    bound = 1 / (compute_s + trip_s)
    speed = median(run.tokens_per_s for run in plain)
    runs = (*plain, *guessed, *thin)
    same = all(run.token_ids == plain[0].token_ids for run in runs)
    as_local = plain[0].token_ids == tuple(expected[: len(plain[0].token_ids)])
    return {
        "local": round(1 / compute_s, 1),
        "bound": round(bound, 2),
        "plain": round(speed, 2),
        "of bound": round(speed / bound, 2),
        "speculated": rounded([run.tokens_per_s for run in guessed]),
        "gain": rounded([b.tokens_per_s / a.tokens_per_s for a, b in zip(plain, guessed, strict=True)]),
        "a trip": rounded([run.tokens_per_trip for run in guessed]),
        "in flight": rounded([run.in_flight for run in guessed]),
        "predicted": rounded([run.predicted or 0.0 for run in guessed]),
        "missed by": rounded([_missed_by(run) for run in (*plain, *guessed)]),
        **({"together": round(together / speed, 2)} if crowd else {}),
        **({"thin": rounded([run.tokens_per_s for run in thin])} if thin else {}),
        "first s": rounded([run.first_token_s for run in plain]),
        "tokens": len(plain[0].token_ids),
        "loop at": loop_begins(plain[0].token_ids),
        "same ids": same,
        "as local": "-" if how else as_local,
        **(_ties(runs, local.margins) if local.keep_margins and not how else {}),
    }


def loop_begins(ids: Sequence[int]) -> int:
    """The token from which on a text repeats what came just before, to its end; its length if it does not.

    Three repetitions are a loop, as are sixteen tokens that are the ones before them.
    """
    begins = len(ids)
    for period in range(1, len(ids) // 2 + 1):
        start = len(ids) - period
        while start and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - period - start >= max(16, 2 * period):
            begins = min(begins, start + period)
    return begins


def _ties(runs: Sequence[Run], margins: Sequence[float]) -> dict[str, Any]:
    first = runs[0].token_ids
    ends = (
        next(
            (i for i, (one, other) in enumerate(zip(first, run.token_ids, strict=False)) if one != other),
            None,
        )
        for run in runs
    )
    differing = [margins[end] for end in ends if end is not None and end < len(margins)]
    near = sum(margin < NEAR for margin in margins[: len(first)])
    return {"near ties": near, "differs at": f"{min(differing):.3f}" if differing else "-"}


def _missed_by(run: Run) -> float:
    return abs((run.predicted or 0.0) / run.tokens_per_s - 1)


def plan_of(options: argparse.Namespace) -> dict[tuple[str, int], list[tuple[float, float, str]]]:
    """Delays, uplinks and kinds by model and number of hops."""
    plan: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    if options.brief:
        for name, hops, delay, mbit, kind in BRIEF:
            plan.setdefault((name, hops), []).append((delay, mbit, kind))
        return plan
    for name, hops in product(options.model, options.hops):
        kinds = options.kind or KINDS.get(name, STORY_KINDS)
        plan[name, hops] = list(product(options.delay, options.mbit, kinds))
    return plan


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hops", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--delay", nargs="+", type=float, default=DELAYS_MS, help="ms, one way")
    parser.add_argument("--mbit", nargs="+", type=float, default=UPLINKS_MBIT)
    parser.add_argument("--kind", nargs="+", choices=PROMPTS, help="those that suit the model, if left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--speculate", default="auto", help="of the speculated runs: auto, or a depth")
    parser.add_argument("--until-loop", action="store_true", help="stop before transformers' text loops")
    parser.add_argument("--brief", action="store_true", help="ten cells, one round of 48 tokens each")
    parser.add_argument("--clients", type=int, default=0, help="that generate at once, plainly")
    parser.add_argument("--thin", action="store_true", help="a client without weights as well")
    options = parser.parse_args(argv)
    if lacking := why_not():
        sys.exit(lacking)
    if options.brief:
        options.rounds, options.tokens = 1, min(options.tokens, BRIEF_TOKENS)
    torch.set_num_threads(1)
    started, rows = time.monotonic(), list[dict[str, Any]]()
    for (name, hops), cells in plan_of(options).items():
        for row in measure(options, name, hops, cells):
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), file=sys.stderr, sep="  ")
    report(f"distance, {options.tokens} tokens, {time.monotonic() - started:.0f} s in all", rows)


if __name__ == "__main__":
    main()
