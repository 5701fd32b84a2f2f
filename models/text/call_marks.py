"""Special tokens around calls of tools: part of a text that is read, hidden in one that is shown."""

from __future__ import annotations

from typing import Final

# As Hermes and Qwen, Mistral, and Llama write them. Some models spell them by ordinary tokens.
CALL_MARKS: Final = frozenset(
    ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")
)
