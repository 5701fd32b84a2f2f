"""The package list, the folders and the links say the same, and a wheel holds all of it and nothing else."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from p2pinfer import bundled
from p2pinfer.bundled import LIBP2P_VERSION

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "node", "reputation", "routing")
DATA = {
    "p2pinfer/bootstrap_peers.txt",
    "p2pinfer/models/configs/family_defaults.json",
    "p2pinfer/py.typed",
}
NOT_SOURCE = (
    *(".git", ".venv", ".*_cache", ".coverage*", ".hypothesis", ".typing", ".unpacking-*"),
    *("__pycache__", "_vendor", "build", "dist", "htmlcov", "node_modules", "*.egg-info"),
)

# What libp2p declares and p2pinfer does without. The first two need a compiler, if not on every Python;
# none of the others is imported by what p2pinfer imports.
LEFT_OUT = {"fastecdsa", "coincurve", "httpx", "requests"} | {
    "grpcio",
    "lru-dict",
    "mypy-protobuf",
    "rpcudp",
    "types-requests",
}


def packages() -> dict[str, Path]:
    """Every folder with Python modules that belongs to the package, by its import name."""
    tops = {"p2pinfer": ROOT / "p2pinfer", **{f"p2pinfer.{folder}": ROOT / folder for folder in FOLDERS}}
    found = dict(tops)
    for name, top in tops.items():
        for init in top.rglob("*/__init__.py"):  # rglob does not follow links
            inner = init.parent.relative_to(top)
            if inner.parts[0] == bundled.FOLDER.name:
                continue
            found[".".join((name, *inner.parts))] = init.parent
    return found


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def test_the_package_list_names_every_folder() -> None:
    assert setuptools_table()["packages"] == sorted(packages())


def test_the_package_dir_names_every_top_folder() -> None:
    expected = {"p2pinfer": "p2pinfer", **{f"p2pinfer.{folder}": folder for folder in FOLDERS}}
    assert setuptools_table()["package-dir"] == expected


def test_make_installs_the_checkout_to_be_edited_and_never_a_copy_of_it() -> None:
    """A copy would hide later changes of the source from every command, and nobody is told."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if re.search(r"\$\(INSTALL\).*\s\"?\.(\[|\s|$)", line)]
    assert len(installs) >= 5
    assert [line for line in installs if "--editable" not in line] == []


def test_the_links_are_relative_and_lead_to_the_folders() -> None:
    links = {path.name: path.readlink() for path in (ROOT / "p2pinfer").iterdir() if path.is_symlink()}
    names = (*FOLDERS, "bootstrap_peers.txt")
    assert links == {name: Path("..") / name for name in names}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, since setuptools leaves folders beside them."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    return zipfile.Path(build(checkout, "wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def unpacked_sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out of the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(checkout, "sdist", folder)) as archive:
        if hasattr(tarfile, "data_filter"):  # Debian 12 has Python 3.11.2, which lacks it
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    (unpacked,) = (entry for entry in folder.iterdir() if entry.is_dir())
    return unpacked


def build(checkout: Path, what: str, out: Path) -> Path:
    """Build as an installer would: the backend of pyproject.toml, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, 'vendor'); import bundle; print(bundle.build_{what}({str(out)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, text=True
    )
    return out / done.stdout.splitlines()[-1]


def files_in(wheel: zipfile.Path) -> set[str]:
    # zipfile.Path lists the folders too
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def modules_in(wheel: zipfile.Path) -> set[str]:
    return {name for name in files_in(wheel) if not name.startswith("p2pinfer-")}


@pytest.mark.slow
def test_the_wheel_holds_every_module_the_bundled_model_and_libp2p_and_nothing_else(
    wheel: zipfile.Path,
) -> None:
    expected = set(DATA)
    for name, folder in packages().items():
        expected |= {f"{name.replace('.', '/')}/{module.name}" for module in folder.glob("*.py")}
    for name in ("tiny-stories", "tiny-stories-drafter"):
        bundled = (ROOT / "models" / name).iterdir()
        expected |= {f"p2pinfer/models/{name}/{file.name}" for file in bundled}
    page = ROOT / "p2pinfer" / "web" / "page"
    expected |= {f"p2pinfer/web/page/{file.name}" for file in page.iterdir()}
    with zipfile.ZipFile(bundle().RELEASE) as release:
        libp2p = {name for name in release.namelist() if re.match(r"libp2p/(.*\.py|py\.typed)$", name)}
    kept = ("METADATA", "WHEEL", "licenses/LICENSE-APACHE", "licenses/LICENSE-MIT")
    libp2p |= {f"libp2p-{LIBP2P_VERSION}.dist-info/{name}" for name in kept}
    assert modules_in(wheel) == expected | {f"p2pinfer/_vendor/{name}" for name in libp2p}


@pytest.mark.slow
def test_the_wheel_names_no_path_of_the_machine_that_built_it(wheel: zipfile.Path, checkout: Path) -> None:
    for name in files_in(wheel):
        held = wheel.root.read(name)
        assert str(checkout).encode() not in held, name
        assert str(ROOT).encode() not in held, name


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel_and_holds_the_tests(
    unpacked_sdist: Path, wheel: zipfile.Path, tmp_path: Path
) -> None:
    again = zipfile.Path(build(unpacked_sdist, "wheel", tmp_path))
    assert modules_in(again) == modules_in(wheel)
    for name in (
        "Makefile",
        "constraints.txt",
        "CHANGELOG.md",
        ".ci/run",
        "tests/test_packaging.py",
        "docs/wire.md",
    ):
        assert (unpacked_sdist / name).exists(), name


@pytest.mark.slow
def test_the_wheel_says_what_an_index_shows_of_it(wheel: zipfile.Path) -> None:
    metadata = Parser().parsestr((dist_info(wheel) / "METADATA").read_text())
    for field in ("Summary", "Maintainer", "Keywords", "License-Expression", "Requires-Python"):
        assert metadata[field], field
    pythons = {
        name.rpartition(" :: ")[2] for name in metadata.get_all("Classifier", ()) if "Python :: 3." in name
    }
    assert pythons == {"3.11", "3.12", "3.13", "3.14"}
    licences = metadata.get_all("License-File", ())
    assert "LICENSE" in licences
    assert all((dist_info(wheel) / "licenses" / name).exists() for name in licences)


@pytest.mark.slow
def test_the_wheel_installs_the_command(wheel: zipfile.Path) -> None:
    assert "p2pinfer = p2pinfer.__main__:main" in (dist_info(wheel) / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_wheels_bootstrap_peers_are_the_repositorys(wheel: zipfile.Path) -> None:
    held = (wheel / "p2pinfer" / "bootstrap_peers.txt").read_bytes()
    assert held == (ROOT / "bootstrap_peers.txt").read_bytes()


def test_whoever_depends_on_the_wheel_is_asked_for_what_libp2p_needs_but_not_for_libp2p() -> None:
    """No installer can leave out a dependency of a dependency, so libp2p must not be one."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = {canonicalize_name(each.name): each for each in map(Requirement, declared)}
    assert not {"libp2p", *LEFT_OUT} & ours.keys()
    theirs = [each for each in requirements(bundled_libp2p()) if each.name not in LEFT_OUT]
    assert len(theirs) > 15
    for needed in theirs:
        mine = ours[canonicalize_name(needed.name)]
        caps = {str(each) for each in needed.specifier if each.operator.startswith("<")}
        assert caps <= {str(each) for each in mine.specifier}, needed


def test_what_is_imported_is_declared() -> None:
    """Otherwise it is there by chance: because another package needs it, or from before."""
    code = """
import sys
sys.modules.update({name: None for name in sys.argv[1].split()})
import p2pinfer.cli.app, p2pinfer.client, p2pinfer.loops.asyncio_client, p2pinfer.node.node
import p2pinfer.node.swarm.mdns
import p2pinfer.node.reach.upnp, p2pinfer.node.metrics, p2pinfer.node.reach.hole_punch
import p2pinfer.node.reach.relay_server
print(*sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None}))
"""
    absent = "coincurve fastecdsa grpc lru mypy_protobuf rpcudp websockets"
    done = subprocess.run([sys.executable, "-c", code, absent], check=True, capture_output=True, text=True)
    imported = set(done.stdout.split()) - set(sys.stdlib_module_names)
    owners = packages_distributions()
    found = {canonicalize_name(owner) for name in imported for owner in owners.get(name, ())}
    assert {"torch", "trio", "aioquic"} <= found
    undeclared = (
        found - closure("p2pinfer") - {"p2pinfer", "libp2p", "coverage"}
    )  # coverage is there when it is measured
    assert not undeclared


def test_libp2p_is_the_one_in_the_package() -> None:
    import libp2p

    assert Path(libp2p.__path__[0]).parent == bundled.FOLDER
    assert bundled_libp2p().version == LIBP2P_VERSION == libp2p.__version__


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tests.chaos.attacker", "benchmarks.stream"])
def test_scripts_that_import_libp2p_first_find_it(script: str) -> None:
    shown = [sys.executable, "-m", script, "--help"]
    subprocess.run(
        shown, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": "benchmarks"}
    )


def test_nothing_that_is_bundled_imports_what_needs_a_compiler() -> None:
    modules = list((bundled.FOLDER / "libp2p").rglob("*.py"))
    assert len(modules) > 300
    for path in modules:
        wanted = {name.partition(".")[0] for name, _ in imports(path.read_text())}
        assert not wanted & {"coincurve", "fastecdsa", "miniupnpc"}, path


def test_libp2p_is_imported_without_clients_of_http() -> None:
    """They took 0.08 s and 8 MB of every process, for certificates that nobody asks for."""
    shown = "import p2pinfer.client, sys; print(*{'httpx', 'requests', 'pygments'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_module_that_takes_anothers_place_offers_all_that_is_asked_of_it() -> None:
    replaced = bundle().REPLACED
    offered = {
        ".".join(path.relative_to(replaced).with_suffix("").parts): names_in(path.read_text())
        for path in replaced.rglob("*.py")
    }
    assert len(offered) == 6
    asked = [
        (module, name)
        for path in (bundled.FOLDER / "libp2p").rglob("*.py")
        for module, name in imports(path.read_text())
        if module in offered and name
    ]
    assert len(asked) >= len(offered)
    assert not [(module, name) for module, name in asked if name not in offered[module]]


def test_unpacking_again_replaces_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "_vendor"
    bundle().unpack(target)
    (target / "libp2p" / "leftover.py").touch()
    bundle().unpack(target)
    assert not (target / "libp2p" / "leftover.py").exists()
    assert "refused" in (target / "libp2p" / "crypto" / "secp256k1.py").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["_vendor"]


def test_a_libp2p_that_is_not_the_released_one_is_not_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bundle()
    altered = tmp_path / module.RELEASE.name
    altered.write_bytes(module.RELEASE.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(module, "RELEASE", altered)
    with pytest.raises(RuntimeError, match="not libp2p as it was released"):
        module.unpack(tmp_path / "_vendor")
    assert not (tmp_path / "_vendor").exists()


def test_another_libp2p_in_the_same_process_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "libp2p", SimpleNamespace(__version__="0.9.0"))
    with pytest.raises(ImportError, match=r"libp2p 0\.9\.0.*needs the 0\.8\.1.*process of its own"):
        bundled.use_bundled_libp2p()


def bundle() -> ModuleType:
    """The build backend, which is no part of the package."""
    spec = spec_from_file_location("bundle", ROOT / "vendor" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bundled_libp2p() -> Distribution:
    return Distribution.at(bundled.FOLDER / f"libp2p-{LIBP2P_VERSION}.dist-info")


def dist_info(wheel: zipfile.Path) -> zipfile.Path:
    (folder,) = (entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info"))
    return folder


def requirements(held: Distribution) -> list[Requirement]:
    """What it needs here, extras aside."""
    found = [Requirement(each) for each in held.requires or ()]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def closure(name: str) -> set[str]:
    """All that comes along with a distribution, by canonical name."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asked = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            needed = [Requirement(each) for each in distribution(asked[0]).requires or ()]
        except PackageNotFoundError:  # for another system
            continue
        for each in needed:
            wanted = each.marker is None or any(
                each.marker.evaluate({"extra": extra}) for extra in (*asked[1], "")
            )
            if wanted:
                found.add(canonicalize_name(each.name))
                waiting.append((each.name, frozenset(each.extras)))
    return found


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Every (module, name or "") that a module imports, inside of functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def names_in(source: str) -> set[str]:
    """What a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found
