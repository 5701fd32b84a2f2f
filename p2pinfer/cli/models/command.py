"""`p2pinfer models`: models on this disk; fetched, described, checked and removed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pinfer.cli.invocation import BOOTSTRAP, DATA_DIR, SWARM_KEY, Invocation, command, group
from p2pinfer.cli.output.terminal import note, print_out, write_out
from p2pinfer.config import SharedConfig

if TYPE_CHECKING:
    from p2pinfer.cli.models.library import HeldModel
    from p2pinfer.config import Settings
    from p2pinfer.models.checkpoint.model_source import ModelSource
    from p2pinfer.models.checkpoint.spec import ModelSpec
    from p2pinfer.models.pieces.manifest import SwarmName
    from p2pinfer.models.progress import Progress
    from p2pinfer.models.span import BlockSpan

_Result = TypeVar("_Result")
_FORMATS = ("auto", "int8", "int4", "nf4")


@group(
    "models",
    examples=[
        "p2pinfer models",
        "p2pinfer models show Qwen/Qwen3-8B",
        "p2pinfer models pull Qwen/Qwen3-8B --blocks 0:12",
        "p2pinfer models pull swarm:0f343b0931126a20f133d67c2b018a3b",
        "p2pinfer models remove Qwen/Qwen3-8B",
    ],
)
@DATA_DIR
def models(call: Invocation) -> None:
    """List the models on this disk.

    MODEL is a Hugging Face id, a folder, a GGUF file, the bundled tiny-stories, or swarm:REVISION. That is
    the content address that `p2pinfer models show` prints. Such a model comes from peers, and all of its
    weights are held against that address.
    """
    _list(call)


def _below(made: click.Command) -> click.Command:
    """Put a command below `models`."""
    models.add_command(made)
    return made


@_below
@command("list", examples=["p2pinfer models list --json"])
@DATA_DIR
def list_(call: Invocation) -> None:
    """List the models on this disk, as `p2pinfer models` alone does."""
    _list(call)


@_below
@command(
    "show",
    examples=["p2pinfer models show Qwen/Qwen3-8B", "p2pinfer models show tiny-stories --json"],
)
@click.argument("model")
@DATA_DIR
def show(call: Invocation, model: str) -> None:
    """Describe MODEL, and say how many of its blocks fit here in each format.

    Of a model of the hub only the config is fetched.
    """
    shared = call.settings().build(SharedConfig)

    def look(progress: Progress) -> dict[str, Any]:
        return _described(_resolve(model, shared, progress), shared.cache_dir)

    told = _in_thread(call, look)
    if call.json:
        write_out(json.dumps(told) + "\n")
        return
    width = max(map(len, told))
    fits = told.pop("fits")
    lines = [f"{name.replace('_', ' '):<{width}}  {_said(name, value)}" for name, value in told.items()]
    for name, blocks in fits.items():
        what = "as stored" if name == "auto" else name
        lines.append(f"{'fits as' if name == 'auto' else '':<{width}}  {what}: {blocks} of {told['blocks']}")
    write_out("\n".join(lines) + "\n")


@_below
@command(
    "pull",
    examples=[
        "p2pinfer models pull Qwen/Qwen3-8B",
        "p2pinfer models pull Qwen/Qwen3-8B --blocks 0:12",
        "p2pinfer models pull swarm:0f343b0931126a20f133d67c2b018a3b",
    ],
)
@click.argument("model")
@click.option("--blocks", metavar="A:B", help="Only what blocks A to B-1 need. [default: all of it]")
@BOOTSTRAP
@SWARM_KEY
@DATA_DIR
def pull(call: Invocation, model: str, blocks: str | None) -> None:
    """Fetch MODEL from the hub, or by its content address from peers.

    What an earlier run has fetched of it is kept, and the next one goes on from there.
    """
    from p2pinfer.models.pieces.manifest import parse_swarm_name
    from p2pinfer.models.span import BlockSpan
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.node.weights.config import WeightsConfig

    settings = call.settings(HostConfig, WeightsConfig)
    shared = settings.build(SharedConfig)
    span = BlockSpan.parse(blocks) if blocks else None
    if (name := parse_swarm_name(model)) is not None:
        source = _from_peers(call, settings, name, span)
    else:

        def fetch(progress: Progress) -> ModelSource:
            source = _resolve(model, shared, progress)
            whole = span or BlockSpan(0, source.spec.num_blocks)
            source.fetch(whole, embedding_and_head=span is None, progress=progress)
            return source

        source = _in_thread(call, fetch)
    holdings = source.holdings()
    here = sum(each.size for each in holdings.manifest.weights if each.name in holdings.paths)
    if call.json:
        told = {
            "model": model,
            "revision": source.spec.revision,
            "bytes": here,
            "folder": str(holdings.folder),
        }
        write_out(json.dumps(told) + "\n")
    elif not call.quiet:
        note(f"{model} is here: {_gib(here)} in {holdings.folder}")


@_below
@command("check", examples=["p2pinfer models check Qwen/Qwen3-8B"])
@click.argument("model")
@DATA_DIR
def check(call: Invocation, model: str) -> None:
    """Hash the weights of MODEL anew. Files of the cache that are damaged are removed.

    The exit code is 1 if one is.
    """
    from p2pinfer.cli.models.library import check_files

    shared = call.settings().build(SharedConfig)

    def look(progress: Progress) -> Any:
        return check_files(_known(model, shared, progress), shared.cache_dir, progress)

    found = _in_thread(call, look)
    if call.json:
        files = [{"name": each.name, "right": each.is_right, "bytes": each.bytes} for each in found]
        write_out(json.dumps({"model": model, "files": files}) + "\n")
    else:
        said = [f"{'right  ' if each.is_right else 'damaged'}  {each.name}" for each in found]
        write_out("\n".join(said or ["no weights are here"]) + "\n")
    if not all(each.is_right for each in found):
        if call.is_for_people:
            note(f"`p2pinfer models pull {model}` fetches what is damaged again")
        raise click.exceptions.Exit(1)


@_below
@command("remove", examples=["p2pinfer models remove Qwen/Qwen3-8B"])
@click.argument("model")
@DATA_DIR
def remove(call: Invocation, model: str) -> None:
    """Remove MODEL from the cache."""
    from p2pinfer.cli.models.library import remove_model

    freed = remove_model(model, call.settings().build(SharedConfig).cache_dir)
    if call.json:
        write_out(json.dumps({"model": model, "bytes": freed}) + "\n")
    elif not call.quiet:
        note(f"{model} is removed; {_gib(freed)} are free again")


def _list(call: Invocation) -> None:
    from p2pinfer.cli.models.library import held_models
    from p2pinfer.cli.output.fitted_table import Column, FittedTable

    held = held_models(call.settings().build(SharedConfig).cache_dir)
    if call.json:
        write_out(json.dumps({"models": [_to_dict(each) for each in held]}) + "\n")
        return
    print_out(
        FittedTable(
            [
                Column("model", [each.name for each in held]),
                Column("here", [_gib(each.bytes_here) for each in held], right=True),
                Column(
                    "of",
                    [_gib(each.bytes_whole) if each.bytes_whole else "?" for each in held],
                    1,
                    right=True,
                ),
                Column("from", [each.kind for each in held], 2),
                Column("revision", [each.revision or "?" for each in held], 3),
            ]
        )
    )


def _to_dict(held: HeldModel) -> dict[str, Any]:
    return {
        "model": held.name,
        "from": held.kind,
        "revision": held.revision,
        "bytes": held.bytes_here,
        "bytes_whole": held.bytes_whole,
        "whole": held.is_whole,
        "folder": str(held.folder),
    }


def _described(source: ModelSource, cache_dir: Path) -> dict[str, Any]:
    from p2pinfer.cli.models.library import swarm_name

    spec, holdings = source.spec, source.holdings()
    here = [each for each in holdings.manifest.weights if each.name in holdings.paths]
    return {
        "model": spec.model,
        "family": spec.family,
        "blocks": spec.num_blocks,
        "hidden_size": spec.hidden_size,
        "context": spec.max_positions,
        "stored_as": spec.dtype,
        "bytes": sum(each.size for each in holdings.manifest.weights),
        "bytes_here": sum(each.size for each in here),
        "revision": spec.revision,
        "name_for_peers": str(swarm_name(holdings)),
        "anybody_may_have_it": holdings.is_open,
        "folder": str(holdings.folder),
        "fits": _fitting(spec),
    }


def _fitting(spec: ModelSpec) -> dict[str, int]:
    """Number of blocks that fit this machine, by format."""
    from p2pinfer.models.compute.target import choose_targets
    from p2pinfer.models.config import ComputeConfig
    from p2pinfer.models.machine.split import blocks_that_fit, rooms_of

    found: dict[str, int] = {}
    for weights in _FORMATS:
        targets = choose_targets(ComputeConfig(weights=weights), spec.dtype)
        rooms = rooms_of([target.device for target in targets])
        block = spec.block_bytes(targets[0].numerics)
        found[weights] = min(sum(blocks_that_fit(room, block) for room in rooms), spec.num_blocks)
    return found


def _from_peers(call: Invocation, settings: Settings, name: SwarmName, span: BlockSpan | None) -> ModelSource:
    import trio

    from p2pinfer.cli.output.progress import Bars
    from p2pinfer.cli.running import run
    from p2pinfer.models.span import BlockSpan
    from p2pinfer.node.host_config import HostConfig, dialling_only
    from p2pinfer.node.swarm.membership import open_swarm
    from p2pinfer.node.transport.identity import new_identity
    from p2pinfer.node.weights.config import WeightsConfig
    from p2pinfer.node.weights.peer_source import PeerWeights

    shared, host_config = settings.build(SharedConfig), settings.build(HostConfig)
    found: list[ModelSource] = []

    async def main() -> None:
        opening = open_swarm(new_identity(), dialling_only(host_config), shared.bootstrap, shared.data_dir)
        async with opening as member:
            peers = PeerWeights(
                member,
                name.revision,
                settings.build(WeightsConfig),
                shared.cache_dir,
                shared.data_dir,
                weights_bytes=shared.weights_bytes,
                is_private=host_config.swarm_key is not None,
                progress=Bars(quiet=call.json or call.quiet),
            )
            await member.reach_somebody(10.0)
            source = await peers.find(name)
            whole = span or BlockSpan(0, source.spec.num_blocks)
            missing = source.missing(whole, embedding_and_head=span is None)
            await peers.bring(missing.files, missing.folder, label=f"fetching {name} from peers")
            await trio.to_thread.run_sync(
                partial(source.fetch, whole, embedding_and_head=span is None), abandon_on_cancel=True
            )
            for peer_id, why in peers.brought.liars.items():
                note(f"peer {peer_id} {why}; it is in the ledger (`p2pinfer reputation`)")
            found.append(source)

    run(main)
    return found[0]


def _resolve(model: str, shared: SharedConfig, progress: Progress) -> ModelSource:
    from p2pinfer.models.checkpoint.source import resolve_model

    return resolve_model(
        model, cache_dir=shared.cache_dir, weights_bytes=shared.weights_bytes, progress=progress
    )


def _known(model: str, shared: SharedConfig, progress: Progress) -> ModelSource:
    """The model as it is here; the hub is not asked about one of its own that was fetched before."""
    if (shared.cache_dir / "hub" / model.replace("/", "--")).is_dir():
        from p2pinfer.models.checkpoint.hub import open_remembered

        if (source := open_remembered(model, shared.cache_dir)) is not None:
            return source
    return _resolve(model, shared, progress)


def _in_thread(call: Invocation, work: Callable[[Progress], _Result]) -> _Result:
    """The result of `work`, which Ctrl-C need not wait for."""
    import trio

    from p2pinfer.cli.output.progress import Bars
    from p2pinfer.cli.running import run

    found: list[_Result] = []

    async def main() -> None:
        progress = Bars(quiet=call.json or call.quiet)
        try:
            found.append(await trio.to_thread.run_sync(work, progress, abandon_on_cancel=True))
        finally:
            progress.done()

    run(main)
    return found[0]


def _said(name: str, value: Any) -> str:
    if name.startswith("bytes"):
        return _gib(int(value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _gib(size: int) -> str:
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GiB"
    return f"{size / (1 << 20):.1f} MiB"
