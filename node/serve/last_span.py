"""Span that this node served last, tried first after a restart since its weights are on disk."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Final, cast

from p2pinfer.folders import write_private
from p2pinfer.models.span import BlockSpan

logger = logging.getLogger(__name__)

FILE_NAME: Final = "last_span.json"
_MAX_BYTES: Final = 1 << 12


def remember_span(data_dir: Path, revision: str, span: BlockSpan) -> None:
    """Note it for `last_span`. What cannot be written is said and does no harm."""
    path = data_dir / FILE_NAME
    content = json.dumps({"revision": revision, "start": span.start, "stop": span.stop})
    try:
        write_private(path, content.encode("ascii"))
    except OSError as exc:
        logger.warning("cannot save the served blocks in %s: %s", path, os.strerror(exc.errno or 0))


def last_span(data_dir: Path, revision: str, num_blocks: int) -> BlockSpan | None:
    """The noted span, if it is one of this very model; a damaged note counts as none."""
    try:
        with (data_dir / FILE_NAME).open("rb") as file:
            noted: Any = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError):
        return None
    if not isinstance(noted, dict):
        return None
    match cast("dict[str, object]", noted):
        case {"revision": str(of), "start": int(start), "stop": int(stop)} if of == revision:
            return BlockSpan(int(start), int(stop)) if 0 <= start < stop <= num_blocks else None
        case _:
            return None
