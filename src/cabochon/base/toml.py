"""Values as TOML, which Python reads but does not write."""

import json
import math
from pathlib import Path
from typing import Any


def toml_value(value: Any) -> str:
    """A number, text, switch, path or list of these, which TOML writes as JSON does, but for the infinite."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # TOML has no pairs of surrogates, and wants the one control character escaped that JSON does not.
    plain = str(value) if isinstance(value, Path) else value
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
