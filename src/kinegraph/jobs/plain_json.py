"""JSON that anybody may have written, or a kill cut off: records, answers, status lines."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 32
"""Of mappings and lists in each other. Whatever copies, prints or writes the content can do that much."""


def parse_json(text: str) -> Any:
    """The content of a JSON text. Raises ValueError for what is none, or is nested deeper than MAX_DEPTH."""
    reason = f"nested deeper than {MAX_DEPTH} levels"
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(reason) from None
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        if not parts:
            return content
        level = [item for part in parts for item in part]
    raise ValueError(reason)
