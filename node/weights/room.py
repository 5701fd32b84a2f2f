"""Room on the disk for weights that come from peers."""

from __future__ import annotations

import shutil
from pathlib import Path

from p2pinfer.models.pieces.chunks import ChunkList
from p2pinfer.models.pieces.partial_file import PartialFile


def lacks_room(path: Path, size: int, cache_dir: Path, weights_bytes: int) -> str:
    """Sentence that says why there is no room for a file; empty if there is.

    Args:
        path: The file that shall be there.
        weights_bytes: Disk that all downloaded models may take in `cache_dir`; 0: whatever is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = PartialFile(path, ChunkList(size, b"")).draft
    needed = size - (draft.stat().st_size if draft.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        return (
            f"{path.name} needs {needed / 1e9:.1f} GB more in {path.parent}, where {free / 1e9:.1f} GB "
            "are free; make room or choose another cache directory"
        )
    if weights_bytes:
        kept = [cache_dir / "hub", cache_dir / "peers"]
        files = [each for folder in kept for each in folder.rglob("*") if each.is_file()]
        used = sum(each.stat().st_size for each in files if not each.is_symlink())
        if needed + used > weights_bytes:
            return (
                f"{path.name} needs {needed / 1e9:.1f} GB more, and models in {cache_dir} take "
                f"{used / 1e9:.1f} of the {weights_bytes / 1e9:.1f} GB that weights_bytes allows; "
                "raise it, or `p2pinfer models remove` some"
            )
    return ""
