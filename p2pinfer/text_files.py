"""Text as editors and shells write it: UTF-8, or Windows' encodings.

Notepad and PowerShell put a byte order mark before UTF-8, and older PowerShell's `>` writes UTF-16. Whoever
reads such a file by name as UTF-8 has a first line that begins with U+FEFF, or nothing at all.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Final

_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(content: bytes) -> str:
    """The text of a file, without a byte order mark: UTF-8, or UTF-16 if it begins with a mark.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    if content.startswith(_UTF16) and len(content) > 2:  # alone, a mark says nothing
        return content.decode("utf-16")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")


def read_text(path: Path) -> str:
    """The text of a file; raises as `decode_text` does, and OSError."""
    return decode_text(path.read_bytes())


def is_text(text: str) -> bool:
    """True if it can be written as UTF-8: no half of a surrogate pair, as bytes that are no text become."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
