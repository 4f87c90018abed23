"""What is wrong with a config, in words: the dotted key, what was got, what is allowed, the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlhf.infra.yaml_tree import leaf_keys

MAX_PROBLEMS_TOLD = 3
SECRET = "secret"  # type of an error whose value must not be repeated: it may be a key or a password


def known_keys(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every dotted key of a config class in order of declaration, sections included, with its pydantic field."""
    found: dict[str, FieldInfo] = {}
    for name, field in cls.model_fields.items():
        found[name] = field
        for section in sections_in(field.annotation):
            found |= {f"{name}.{key}": below for key, below in known_keys(section).items()}
    return found


def accepts_null(field: FieldInfo) -> bool:
    """Whether null is a value of this key."""
    try:
        TypeAdapter[Any](_annotation(field)).validate_python(None)
    except ValidationError:
        return False
    return True


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """A validation error of `cls` as one line; the first three keys that are wrong are told, the rest counted."""
    by_key: dict[str, list[ErrorDetails]] = {}
    fields = known_keys(cls)
    for problem in error.errors(include_url=False):
        fields |= _item_keys_along(fields, problem["loc"])
        key = _dotted(problem["loc"], fields, is_unknown=problem["type"] == "extra_forbidden")
        by_key.setdefault(key, []).append(problem)
    told = [_sentence(key, problems, fields) for key, problems in by_key.items()]
    more = f"; and {len(told) - MAX_PROBLEMS_TOLD} more" if len(told) > MAX_PROBLEMS_TOLD else ""
    return "; ".join(told[:MAX_PROBLEMS_TOLD]) + more


def nearest_key(key: str, known: Collection[str]) -> str:
    """The known dotted key most like `key`: the last part weighs most, the section it stands in a little."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        other_section, _, other_name = candidate.rpartition(".")
        by_name = difflib.SequenceMatcher(None, name.lower(), other_name.lower()).ratio()
        same_section = section == other_section
        by_section = 1.0 if same_section else difflib.SequenceMatcher(None, section, other_section).ratio()
        return by_name + 0.3 * by_section

    return max(known, key=likeness)


def _sentence(key: str, problems: Sequence[ErrorDetails], fields: Mapping[str, FieldInfo]) -> str:
    """All problems of one key in one sentence; there are several when no branch of a union fits."""
    first = problems[0]
    if first["type"] == "extra_forbidden":
        # `optimiser.lr` is more telling than `optimiser`, and often only the section is wrong.
        leaves = sorted(leaf_keys(first["input"], f"{key}.")) if isinstance(first["input"], dict) else []
        unknown = leaves[0] if leaves else key
        return f"unknown config key '{unknown}'; the nearest known key is '{nearest_key(unknown, fields)}'"
    if first["type"] == "missing":
        return f"config key '{key}' is required; set it in the file or on the command line as {key}=VALUE"
    said = " or ".join(
        problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected") for problem in problems
    )
    if not key:
        return f"the config does not fit together: {said}"
    if first["type"] == SECRET:
        return f"config key '{key}': {said}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"config section '{key}' does not fit together: {said}"
    known = fields.get(key)
    hints = [hint for hint in (_allowed_range(known), known.description) if hint] if known else []
    return f"config key '{key}': got {first['input']!r}, {said}" + (f" ({'; '.join(hints)})" if hints else "")


def _annotation(field: FieldInfo) -> Any:
    return field.annotation


def _allowed_range(field: FieldInfo) -> str:
    bounds = []
    for constraint in field.metadata:
        if isinstance(constraint, Gt):
            bounds.append(f"more than {constraint.gt}")
        elif isinstance(constraint, Ge):
            bounds.append(f"at least {constraint.ge}")
        elif isinstance(constraint, Lt):
            bounds.append(f"less than {constraint.lt}")
        elif isinstance(constraint, Le):
            bounds.append(f"at most {constraint.le}")
    return "allowed: " + " and ".join(bounds) if bounds else ""


def _item_keys_along(fields: Mapping[str, FieldInfo], location: Sequence[str | int]) -> dict[str, FieldInfo]:
    """Keys of the list items and dict entries, themselves config sections, that the location passes through."""
    found: dict[str, FieldInfo] = {}
    for depth in range(1, len(location)):
        holder = fields.get(".".join(map(str, location[:depth])))
        item = ".".join(map(str, location[: depth + 1]))
        if holder is None or item in fields:
            continue
        direct = set(sections_in(holder.annotation))
        for section in set(sections_in(holder.annotation, inside_containers=True)) - direct:
            found[item] = FieldInfo(annotation=section)
            found |= {f"{item}.{key}": below for key, below in known_keys(section).items()}
    return found


def _dotted(location: Sequence[str | int], fields: Mapping[str, FieldInfo], is_unknown: bool) -> str:
    """Location as a dotted key, without the parts that pydantic adds to name the branch of a union.

    Such a part stands below a known key and is not known itself; so is a mistyped name, but that one comes last.
    """
    parts: list[str] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        is_known = ".".join([*parts, str(part)]) in fields
        names_a_branch = isinstance(part, str) and ".".join(parts) in fields and not is_known
        if not names_a_branch or (is_last and is_unknown):
            parts.append(str(part))
    return ".".join(parts)


def sections_in(annotation: Any, inside_containers: bool = False) -> Iterator[type[BaseModel]]:
    """Config classes in an annotation: `Section` and `Section | None`, on request also `list[Section]` and the like."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    is_container = isinstance(get_origin(annotation), type) and not isinstance(annotation, UnionType)
    if is_container and not inside_containers:
        return
    for argument in get_args(annotation):
        yield from sections_in(argument, inside_containers)
