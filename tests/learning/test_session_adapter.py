"""Texts of a tuned model over hops equal those of peft on one machine, and wrong adapters are refused."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import trio
from torch import Tensor

from p2pinfer.api.config import ApiConfig
from p2pinfer.api.served_models import ServedModels
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.errors import ConfigError, NoRoute, PeerError, PeerRefused
from p2pinfer.learning import offered
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.learning.brought import AdapterShelf, BroughtAdapter
from p2pinfer.models.learning.peft_lora import read_lora
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.routing.announcement import OfferedAdapter
from p2pinfer.session.terms import SessionAdapter

from ..memory_client import open_memory_client
from ..node.memory_swarm import FLOAT32

peft: Any = pytest.importorskip("peft", reason="the oracle of adapters: pip install '.[dev]'")
transformers: Any = pytest.importorskip("transformers")

_files: Any = safetensors.torch
PROMPT = "Once upon a time"
TOKENS = 10
ENOUGH_TO_TELL = 24  # tokens, for an audit of them
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, "model.layers.3.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 7, "model.layers.3.self_attn.q_proj": 9},
        "use_rslora": True,
    },
    "one block": {"r": 2, "lora_alpha": 400, "target_modules": ["o_proj"], "layers_to_transform": [6]},
}


class Tuned:
    """A folder of an adapter by peft, and the ids that it leads to on one machine."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, options: dict[str, Any]) -> None:
        torch.manual_seed(len(str(options)))
        self.folder = folder
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers what it renamed
            model = peft.get_peft_model(
                base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
            )
        with torch.no_grad():
            for name, each in model.named_parameters():
                if "lora_" in name:
                    # As of a bfloat16 base, whose adapters are in that dtype.
                    each.copy_((torch.randn_like(each) * 0.2).bfloat16())
        model.save_pretrained(folder)
        if options.get("r") == 3:
            path, files = folder / "adapter_model.safetensors", _files
            files.save_file({name: each.bfloat16() for name, each in files.load_file(path).items()}, path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
        ids: list[int] = list(tokenizer(PROMPT)["input_ids"])
        self.ids: list[int] = []
        with torch.no_grad():
            for _ in range(TOKENS):
                logits = model(input_ids=torch.tensor([ids + self.ids])).logits[0, -1]
                self.ids.append(int(logits.argmax()))


@pytest.fixture(scope="module")
def tuned(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tuned]:
    made = tmp_path_factory.mktemp("adapters")
    return {kind: Tuned(checkpoint, made / kind, options) for kind, options in KINDS.items()}


async def ids_of(client: Client, adapter: SessionAdapter | None, tokens: int = TOKENS) -> list[int]:
    generation = client.generate(PROMPT, adapter=adapter, max_new_tokens=tokens, stop_ids=())
    async for _ in generation:
        pass
    return list(generation.result.token_ids)


@pytest.mark.slow
async def test_texts_with_different_adapters_at_once_equal_those_of_peft(
    checkpoint: Checkpoint, tuned: dict[str, Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        few = ServeConfig(max_train_sessions_per_client=2)  # no more than one client takes at once
        await swarm.serve("a", 0, 3, config=few)
        await swarm.serve("b", 3, 8, config=few)
        plain = await ids_of(client, None)
        adapters = {kind: await client.load_adapter(each.folder) for kind, each in tuned.items()}
        found: dict[tuple[str, int], list[int]] = {}

        async def run(kind: str, number: int) -> None:
            found[kind, number] = await ids_of(client, adapters.get(kind))

        async with trio.open_nursery() as nursery:
            for kind in ("none", *tuned):
                for number in range(2):
                    nursery.start_soon(run, kind, number)
        for (kind, _), ids in found.items():
            assert ids == (tuned[kind].ids if kind in tuned else plain), kind
        for kind, each in tuned.items():
            assert each.ids != plain, kind
        await swarm.all_closed()
        for served in swarm.served.values():
            server: Any = served.server
            while server._served.adapters.held_bytes:  # until the swarm's limit, if something keeps one
                gc.collect()
                await trio.lowlevel.checkpoint()


async def test_a_hop_that_dies_is_replaced_by_one_that_is_brought_the_adapter(
    checkpoint: Checkpoint, tuned: dict[str, Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        await swarm.serve("c", 3, 8)
        adapter = await client.load_adapter(tuned["all"].folder)
        generation = client.generate(PROMPT, adapter=adapter, max_new_tokens=TOKENS)
        async for _ in generation:
            if len(generation.result.token_ids) == 4:
                await swarm.network.kill(generation.result.route[1].peer_id)
        assert list(generation.result.token_ids) == tuned["all"].ids
        assert generation.result.failovers


async def test_a_node_offers_an_adapter_to_everybody(
    checkpoint: Checkpoint, tuned: dict[str, Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By id or name; where a node offers it, nothing is brought, and its limits for clients do not count."""
    folder = tuned["all"].folder
    async with open_memory_client(checkpoint, monkeypatch, tmp_path, audit=AuditConfig(rate=1.0)) as (
        client,
        swarm,
    ):
        takes_none = ServeConfig(client_adapter_bytes=1, session_adapter_bytes=0)
        await swarm.serve("a", 0, 3, config=takes_none, adapters=[folder, tuned["patterns"].folder])
        await swarm.serve("b", 3, 8)  # offers none, and is brought it
        announced = {
            each.name: each for peer in swarm.view.live(checkpoint.spec.revision) for each in peer.adapters
        }
        assert [*announced] == ["all", "patterns"]
        for name in ("all", announced["all"].id, announced["all"].id[:8]):
            assert await ids_of(client, await client.load_adapter(name)) == tuned["all"].ids
        adapter = await client.load_adapter("patterns")
        assert await ids_of(client, adapter) == tuned["patterns"].ids
        models = ServedModels([client], ApiConfig(), lambda _: list(announced.values()))
        served = models.named("all")  # as a request to the HTTP API names it
        assert served.model.id == announced["all"].id
        assert await ids_of(client, await models.adapter_of(served)) == tuned["all"].ids
        await client.audits_settled()
        assert client.audits.passed and not client.audits.failed


async def test_an_adapter_that_nobody_offers_is_refused_with_a_sentence(
    checkpoint: Checkpoint, tuned: dict[str, Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offered, "WAIT_S", 0.05)  # nobody comes, however long it is
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        with pytest.raises(ConfigError, match=r"nobody in this swarm .*; it has none"):
            await client.load_adapter("stories")
        await swarm.serve("a", 0, 8, adapters=[tuned["all"].folder])
        with pytest.raises(ConfigError, match=r"it has all \([0-9a-f]{32}\)"):
            await client.load_adapter("stories")
        swarm.announce("liar", 0, 8, adapters=(OfferedAdapter(b"l" * 32, "stories", 9),))
        with pytest.raises(PeerError):  # it hands out nothing
            await client.load_adapter("stories")
        swarm.announce("other", 0, 8, adapters=(OfferedAdapter(b"o" * 32, "stories", 9),))
        with pytest.raises(ConfigError, match="2 adapters are called 'stories'; name one by its id"):
            await client.load_adapter("stories")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"session_adapter_bytes": 0}, "adapters of sessions take 0 bytes, the limit"),
        ({"max_adapter_rank": 2}, "an update of rank 4; this node takes 2"),
        ({"client_adapter_bytes": 64}, "takes adapters of 64 bytes"),
    ],
)
async def test_a_node_that_takes_no_such_adapter_says_so(
    checkpoint: Checkpoint,
    tuned: dict[str, Tuned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    said: str,
) -> None:
    config = ClientConfig(dtype="float32", find_timeout_s=0.1, busy_pause_s=0.01, max_attempts=1)
    async with open_memory_client(checkpoint, monkeypatch, tmp_path, config=config) as (client, swarm):
        await swarm.serve("a", 0, 8, config=ServeConfig(**options))
        adapter = await client.load_adapter(tuned["all"].folder)
        with pytest.raises((NoRoute, PeerRefused), match=said):
            await ids_of(client, adapter)
        assert len(await ids_of(client, None)) == TOKENS


class Scaled:
    """An adapter that changes less than it should."""

    def __init__(self, whole: BroughtAdapter) -> None:
        self.whole = whole  # a node keeps adapters as long as somebody holds them

    def pair(self, block: int, product: str) -> tuple[Tensor, Tensor] | None:
        pair = self.whole.pair(block, product)
        return None if pair is None else (pair[0], pair[1] * 0.9)


def ignored(_: BroughtAdapter) -> None:
    return


def applied(found: BroughtAdapter) -> BroughtAdapter:
    return found


LIES: dict[str, Callable[[BroughtAdapter], object]] = {
    "ignored": ignored,
    "scaled": Scaled,
    "": applied,
    "rounded": applied,  # by a node that computes in bfloat16, which is no lie
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_hop_that_does_not_apply_the_adapter_is_found_and_banned(
    checkpoint: Checkpoint,
    tuned: dict[str, Tuned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lie: str,
) -> None:
    audit = AuditConfig(rate=1.0)
    async with open_memory_client(checkpoint, monkeypatch, tmp_path, audit=audit) as (client, swarm):
        await swarm.serve("a", 0, 3)
        await swarm.serve(
            "b", 3, 8, compute=replace(FLOAT32, dtype="bfloat16") if lie == "rounded" else FLOAT32
        )
        training: Any = swarm.served["b"].training
        shelf: AdapterShelf = training._served.adapters
        find = shelf.find

        def find_another(client: str, revision: str, span: BlockSpan) -> object:
            found = find(client, revision, span)
            assert found is not None
            return LIES[lie](found)

        # A node's tuned blocks are cut out of what it was brought; here it computes with something else.
        monkeypatch.setattr(shelf, "find", find_another)
        adapter = await client.load_adapter(tuned["all"].folder)
        ids = await ids_of(client, adapter, ENOUGH_TO_TELL)
        await client.audits_settled()
        lies = lie in ("ignored", "scaled")
        assert client.ledger.is_banned("b") == lies
        assert not client.ledger.is_banned("a")
        assert (client.audits.passed, client.audits.failed) == ((1, 1) if lies else (2, 0))
        assert lie == "rounded" or (ids[:TOKENS] == tuned["all"].ids) != lies
        assert not client.ledger.proofs()  # nobody else could check one


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of an adapter with fields of its config changed."""
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def ends(checkpoint: Checkpoint) -> EmbeddingAndHead:
    return load_embedding_and_head(checkpoint, FLOAT32)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "holds a IA3"),
        ({"use_dora": True}, "has DoRA"),
        ({"bias": "all"}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save, which are whole weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "has target_parameters"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "is no name of a module"),
        ({"alpha_pattern": [1]}, "has to be an object"),
        ({"lora_alpha": "x"}, "have to be numbers"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_with_a_sentence(
    tuned: dict[str, Tuned], ends: EmbeddingAndHead, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    folder = changed(tuned["all"].folder, tmp_path / "other", **config)
    with pytest.raises(ConfigError, match=said):
        read_lora(folder, ends.spec, ends.architecture)


A = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A.format(0): torch.zeros(4, 7)}, "has shapes"),
        ({A.format(99): torch.zeros(4, 320)}, "changes block 99"),
        ({A.format(0): torch.full((4, 320), torch.nan)}, "no finite numbers"),
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "changes base_model.model.lm_head.weight"),
        ({"base_model.model.model.layers.0.mlp.router.lora_A.weight": torch.zeros(4, 256)}, "is no product"),
    ],
)
def test_an_adapter_for_another_model_is_refused_with_a_sentence(
    tuned: dict[str, Tuned],
    ends: EmbeddingAndHead,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    said: str,
) -> None:
    folder = changed(tuned["all"].folder, tmp_path / "other")
    path, files = folder / "adapter_model.safetensors", safetensors.torch
    opened: Any = files
    opened.save_file(opened.load_file(path) | tensors, path)
    with pytest.raises(ConfigError, match=said):
        read_lora(folder, ends.spec, ends.architecture)


def test_files_that_are_no_adapter_are_refused_with_a_sentence(
    tuned: dict[str, Tuned], ends: EmbeddingAndHead, tmp_path: Path
) -> None:
    spec, architecture = ends.spec, ends.architecture
    with pytest.raises(ConfigError, match="holds no adapter_config"):
        read_lora(tmp_path, spec, architecture)
    folder = changed(tuned["all"].folder, tmp_path / "pickled")
    path = folder / "adapter_model.safetensors"
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="a pickle, which could run code"):
        read_lora(folder, spec, architecture)
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="is damaged"):
        read_lora(folder, spec, architecture)
    opened: Any = safetensors.torch
    opened.save_file({"x": torch.zeros(1)}, path, metadata={"p2pinfer_revision": "0" * 32})
    with pytest.raises(ConfigError, match="was trained on other weights"):
        read_lora(folder, spec, architecture)
