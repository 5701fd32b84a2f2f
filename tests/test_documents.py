"""What is written about p2pinfer is true of it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy
import shlex
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import p2pinfer
from p2pinfer.api.dialects import DIALECTS
from p2pinfer.cli.app import app, run
from p2pinfer.config import SECTIONS, SHARED, SharedConfig, section_of
from p2pinfer.models.configs.not_computed import NOT_COMPUTED
from p2pinfer.node.node import NodeConfig
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.policy import ask_policy, load_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer() -> dict[str, Any]:
    """docs/write_configuration.py, loaded by its path: scripts are no package."""
    return runpy.run_path(str(ROOT / "docs" / "write_configuration.py"))


def blocks(language: str) -> list[str]:
    """The README's fenced blocks whose fence says exactly that."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_settings_document_is_what_make_docs_writes(writer: dict[str, Any]) -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == writer["configuration"](), "run `make docs`"


def test_the_models_document_is_what_make_docs_writes() -> None:
    """Each sentence in its table of refusals is the one that the code gives."""
    writer = runpy.run_path(str(ROOT / "docs" / "write_models.py"))
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == writer["models"](), "run `make docs`"
    named = {key for _, said in writer["REFUSED"] for key in said}
    assert NOT_COMPUTED.keys() <= named, "docs/write_models.py has no example of it"


def test_the_description_of_the_api_is_what_make_docs_writes() -> None:
    writer = runpy.run_path(str(ROOT / "docs" / "write_openapi.py"))
    written = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(writer["openapi"]()), "run `make docs`"
    served = {path for dialect in DIALECTS for path in dialect.paths}
    assert json.loads(written)["paths"].keys() == served


def test_the_commands_document_is_what_make_docs_writes() -> None:
    """Help as it is today, wherever a version of click breaks its lines; what was printed, as recorded."""
    writer = runpy.run_path(str(ROOT / "docs" / "write_commands.py"))
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written.split() == writer["commands"]().split(), "run `make docs`"
    for name in app.commands:
        assert f"\n## p2pinfer {name}\n" in written


@pytest.mark.usefixtures("undo_logging")
@pytest.mark.parametrize("name", ["friends.md", "hardware.md"])
def test_the_plans_of_a_guide_are_what_the_planner_says(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    writer = runpy.run_path(str(ROOT / "docs" / "write_plans.py"))
    assert "$ p2pinfer plan" in text
    assert text == writer["with_plans"](text), "run `make docs`"


def test_the_site_has_every_document() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - set(named)
    assert not missing, "name it in the nav of mkdocs.yml"


def test_every_layer_has_its_section_and_every_setting_its_comment(writer: dict[str, Any]) -> None:
    layers = [layer for layer, _ in writer["LAYERS"]]
    assert {section_of(layer) for layer in layers} == set(SECTIONS)
    for layer in (SharedConfig, *layers):
        own = {field.name for field in dataclasses.fields(layer)} - (
            set() if layer is SharedConfig else SHARED
        )
        said = writer["comments"](layer)
        assert all(said[name] for name in own)


def test_a_node_shares_its_defaults_with_every_command() -> None:
    shared = dataclasses.asdict(SharedConfig())
    node = dataclasses.asdict(NodeConfig())
    assert shared == {name: node[name] for name in shared}


def test_the_readme_opens_with_two_commands() -> None:
    assert [line.partition("#")[0].strip() for line in blocks("sh")[0].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_every_link_in_a_document_leads_somewhere() -> None:
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.usefixtures("undo_logging")
@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_every_command_in_the_readme_is_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as its options go: `--print-config` ends it before it does anything."""
    command = line.partition("  #")[0].rpartition("| ")[2]
    program, *argv = shlex.split(command)
    if program == "p2pinfer":
        assert run([*argv, "--print-config"]) == 0, capsys.readouterr().err


def test_the_policy_of_the_readme_prefers_its_neighbours(tmp_path: Path) -> None:
    (source,) = blocks("python policy")
    (tmp_path / "my_policy.py").write_text(source)
    policy = load_policy("my_policy:Neighbours", tmp_path)
    near, far = candidate("near", 0, 8, 10.0), candidate("far", 0, 8, 200.0)
    half = candidate("half", 0, 4, 10.0)
    request = p2pinfer.RouteRequest("ab" * 16, num_blocks=8, hidden_bytes_per_token=640, tokens=100)

    def chosen(*candidates: p2pinfer.Candidate) -> tuple[str, ...]:
        return ask_policy(policy, candidates, request, Ledger())[0].peer_ids

    assert chosen(near, far) == ("near",)
    assert chosen(half, far) == ("far",)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10


def candidate(peer_id: str, start: int, stop: int, rtt_ms: float) -> p2pinfer.Candidate:
    # The far one is the fastest by far, so that only the policy's own rule prefers the near one.
    tokens_per_s = 10_000.0 if peer_id == "far" else 1.0
    said = Announcement(
        peer_id, "m", "ab" * 16, p2pinfer.BlockSpan(start, stop), "float32", tokens_per_s, 1 << 20, 1
    )
    return p2pinfer.Candidate(said, rtt_ms)


def test_public_names_are_there_and_are_the_ones_type_checkers_see() -> None:
    source = (ROOT / "p2pinfer" / "__init__.py").read_text(encoding="utf-8")
    for_checkers = re.findall(r"^    from \.(\S+) import (\w+) as \2$", source, re.MULTILINE)
    homes = {name: module for module, names in p2pinfer._HOMES.items() for name in names}  # pyright: ignore[reportPrivateUsage]
    assert {name: module for module, name in for_checkers} == homes
    assert dir(p2pinfer) == sorted(homes)
    for name in homes:
        assert getattr(p2pinfer, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        p2pinfer.Nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue, reportUnusedExpression]


def test_the_python_examples_of_the_readme_compile() -> None:
    for source in blocks("python"):
        compile(source, "README.md", "exec")


# ---------------------------------------------------------------------- for engineers

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("p2pinfer", "node", "models", "routing", "reputation")
SUBORDINATE = (
    "What",
    "Who",
    "Whom",
    "Whose",
    "How",
    "Whether",
    "When",
    "Where",
    "Which",
    "Why",
    "That",
    "So",
)

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, ast.Module]:
    """Every module of p2pinfer's own, by its path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "_vendor" not in path.parts
    }


def definitions(tree: ast.AST, name: str = "") -> list[tuple[str, Definition]]:
    """A module, and its classes and functions with their dotted names; those inside functions left out."""
    found: list[tuple[str, Definition]] = [(name, tree)] if isinstance(tree, Definition) else []
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(tree):
            inner = getattr(child, "name", "") if isinstance(child, Definition) else ""
            if inner or isinstance(child, ast.If | ast.Try):
                found += definitions(child, f"{name}.{inner}".strip(".") if inner else name)
    return found


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def paths_in(text: str) -> set[str]:
    """The files and folders that stand between backticks."""
    return set(re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*(?:/|/[a-z_0-9]+\.py))`", text))


def section(heading: str) -> str:
    return ARCHITECTURE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_docstring_begins_with_a_noun_or_a_verb() -> None:
    """At least with none of the words that open a clause without a noun to search for."""
    clauses = [
        f"{path}: {name}: {said.splitlines()[0]}"
        for path, tree in modules().items()
        for name, node in definitions(tree)
        if (said := ast.get_docstring(node)) and said.split(maxsplit=1)[0].rstrip(",") in SUBORDINATE
    ]
    assert not clauses, "\n".join(clauses)


def test_public_things_have_docstrings() -> None:
    public = [
        (path, name, ast.get_docstring(node))
        for path, tree in modules().items()
        for name, node in definitions(tree)
        if is_public(name)
    ]
    missing = [f"{path}: {name}" for path, name, said in public if not said]
    assert len(missing) <= 0.05 * len(public), "\n".join(missing)


def test_every_path_in_the_architecture_document_is_there() -> None:
    paths = paths_in(ARCHITECTURE)
    assert len(paths) > 80
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_every_test_that_a_document_names_is_there() -> None:
    named = [
        each
        for document in (ROOT / "docs").glob("*.md")
        for each in re.findall(r"(tests/[\w/]+\.py)::(\w+)", document.read_text(encoding="utf-8"))
    ]
    assert len(named) >= 20
    for path, name in named:
        assert re.search(
            rf"^(async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE
        ), name


def test_every_method_in_the_architecture_document_is_there() -> None:
    names = {name for tree in modules().values() for name, _ in definitions(tree)}
    classes = {name for name in names if name and name[0].isupper()}
    named = {name for name in re.findall(r"`(\w+\.\w+)`", ARCHITECTURE) if name.partition(".")[0] in classes}
    assert len(named) > 30
    assert not named - names


def test_every_room_is_on_the_map() -> None:
    rooms = {f"{path.rpartition('/')[0]}/" for path in modules() if path.count("/") > 1}
    assert not (rooms | {"routing/", "reputation/"}) - paths_in(section("The map"))


def rows_of_the_map() -> list[list[str]]:
    """The rooms and modules of each row, from above to below, as paths."""
    cells = [line.split("|")[2] for line in section("The map").splitlines() if line.startswith("|")]
    return [found for cell in cells if (found := re.findall(r"`([a-z_0-9/.]+)`", cell))]


def layers() -> list[list[list[str]]]:
    """Those of each contract, from above to below, as paths without an ending."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [
        [
            [name.removeprefix("p2pinfer.").replace(".", "/") for name in layer.split(" | ")]
            for layer in contract["layers"]
        ]
        for contract in pyproject["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]


def test_the_rows_of_the_map_are_the_layers_of_the_contracts() -> None:
    where: dict[str, int] = {}
    for at, row in enumerate(rows_of_the_map()):
        for path in row:
            where[path.removeprefix("p2pinfer/").removesuffix(".py").removesuffix("/")] = at
    named: set[str] = set()
    for contract in layers():
        above = -1
        for layer in contract:
            named.update(layer)
            rows = {at for path, at in where.items() for one in layer if f"{path}/".startswith(f"{one}/")}
            missing = [one for one in layer if not any(f"{path}/".startswith(f"{one}/") for path in where)]
            assert not missing, "on no row"
            assert min(rows) > above, f"{layer} should be below what is above it in the contract"
            assert len(layer) == 1 or len(rows) == 1, f"{layer} should be one row"
            above = max(rows)
    assert not where.keys() - named, "on the map and in no contract"


def test_the_walk_of_a_token_names_at_most_ten_rooms_and_files() -> None:
    assert 5 < len(paths_in(section("A token's way"))) <= 10


def test_the_glossary_has_each_word_once_and_names_what_is_there() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .+ \| (.*?) ?\|$", text, re.MULTILINE)[2:]
    words = [word for word, _ in rows]
    assert words == sorted({*words}, key=str.lower)
    names = {name for tree in modules().values() for name, _ in definitions(tree)} | {"ReplaySource"}
    for _, code in rows:
        name = code.strip("`")
        assert not name or ((ROOT / name).exists() if "/" in name else name in names), name


def test_rooms_and_modules_stay_small() -> None:
    rooms = Counter(path.rpartition("/")[0] for path in modules())
    assert max(rooms.values()) <= 20, rooms.most_common(1)
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert not {path: count for path, count in lines.items() if count > 400}
