"""Validation by JSON schema, as far as the schemas of the configurations use it (draft 2020-12).

A keyword that is not known here is an error, so that nothing passes for not having been looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]
ANNOTATIONS = {"$schema", "$defs", "title", "description", "default", "format"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    "const": lambda value, wanted: value == wanted,
    "enum": lambda value, wanted: value in wanted,
    "minItems": lambda value, bound: len(value) >= bound,
    "maxItems": lambda value, bound: len(value) <= bound,
}
# Of which values a bound speaks; of others it says nothing.
KINDS = dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), TYPES["number"]) | {
    "pattern": TYPES["string"], "minItems": TYPES["array"], "maxItems": TYPES["array"],
}  # fmt: skip


def mistakes(value: Any, schema: Schema, root: Schema, place: str = "") -> list[str]:
    """Where and by which keyword a value is refused; empty when it is valid."""
    found: list[str] = []
    for keyword, wanted in schema.items():
        if keyword in ANNOTATIONS:
            continue
        if keyword == "$ref":
            found += mistakes(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, place)
        elif keyword == "type":
            found += [] if _is_of_type(value, wanted) else [f"{place}: type"]
        elif keyword == "anyOf":
            found += [] if any(not mistakes(value, one, root, place) for one in wanted) else [f"{place}: anyOf"]
        elif keyword == "items":
            items = enumerate(value) if isinstance(value, list) else ()
            found += [text for index, item in items for text in mistakes(item, wanted, root, f"{place}.{index}")]
        elif keyword == "prefixItems":
            pairs = enumerate(zip(value, wanted, strict=False)) if isinstance(value, list) else ()
            found += [text for index, (item, one) in pairs for text in mistakes(item, one, root, f"{place}.{index}")]
        elif keyword in ("properties", "required", "additionalProperties"):
            found += _in_object(value, keyword, schema, root, place) if isinstance(value, dict) else []
        elif keyword in BOUNDS:
            is_met = not isinstance(value, KINDS.get(keyword, (object,))) or BOUNDS[keyword](value, wanted)
            found += [] if is_met else [f"{place}: {keyword}"]
        else:
            raise NotImplementedError(f"the keyword {keyword} of {place or 'the whole'}")
    return found


def _is_of_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name])


def _in_object(value: dict[str, Any], keyword: str, schema: Schema, root: Schema, place: str) -> list[str]:
    known: Schema = schema.get("properties", {})
    if keyword == "required":
        return [f"{place}.{name}: required" for name in schema["required"] if name not in value]
    if keyword == "properties":
        inside = {name: known[name] for name in value if name in known}
    else:
        others, allowed = [name for name in value if name not in known], schema["additionalProperties"]
        if allowed is False:
            return [f"{place}.{name}: additionalProperties" for name in others]
        inside = {} if allowed is True else dict.fromkeys(others, allowed)
    return [text for name, one in inside.items() for text in mistakes(value[name], one, root, f"{place}.{name}")]
