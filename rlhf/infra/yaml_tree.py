"""YAML text to plain nested dicts: strict reading, `extends`, merging, and dotted overrides."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.infra.errors import UserError

EXTENDS = "extends"
SET_BY_USER = "set_by_user"
INHERITED = "inherited"


@dataclass(frozen=True)
class YamlFile:
    """Values of a config file on top of the one it extends, and the dotted keys that each of the two set."""

    tree: dict[str, Any]
    set_keys: frozenset[str]
    inherited_keys: frozenset[str] = frozenset()


def read_yaml_file(path: Path) -> YamlFile:
    """Read a config file and, one level deep, the file that its `extends` names relative to it.

    A file written by `config.to_yaml` lists under `set_by_user` which of its keys a person chose, and under `inherited`
    which an extended file had; in any other file all were chosen. Raises `UserError` when it is unreadable, not YAML,
    or not a mapping.
    """
    tree = _read_mapping(path)
    listed, listed_as_inherited = tree.pop(SET_BY_USER, None), tree.pop(INHERITED, None)
    base_name = tree.pop(EXTENDS, None)
    set_keys = frozenset(map(str, listed)) if isinstance(listed, list) else frozenset(leaf_keys(tree))
    inherited = set(map(str, listed_as_inherited)) if isinstance(listed_as_inherited, list) else set()
    if base_name is None:
        return YamlFile(tree, set_keys, frozenset(inherited))
    base_path = path.parent / str(base_name)
    if not base_path.is_file():
        raise UserError(f"'{path}' extends '{base_name}', but the file '{base_path}' does not exist")
    base = _read_mapping(base_path)
    if EXTENDS in base:
        raise UserError(
            f"'{path}' extends '{base_path}', which extends '{base[EXTENDS]}'; "
            "only one level is allowed, so extend the last one or copy its keys"
        )
    for listing in (SET_BY_USER, INHERITED):
        base.pop(listing, None)
    inherited = leaf_keys(base)
    for key in leaf_keys(tree):
        inherited = without_key(inherited, key)
    return YamlFile(merged(base, tree), set_keys, frozenset(inherited))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value` into the dotted key and the value read as YAML."""
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not all(key.split(".")):
        raise UserError(f"override '{text}' is not of the form key.subkey=value, for example optimizer.lr=1e-4")
    return key, _parse(value, f"override '{text}'")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`: mappings are merged key by key, everything else (lists too) is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place; a number as a part of the key is a place in a list that is already there."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_place(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override '{key}' goes below '{part}', which is the single value {node!r}")
    if isinstance(node, list):
        node[_place(node, last, key)] = value
    elif isinstance(value, dict) and isinstance(node.get(last), dict):
        node[last] = merged(node[last], value)
    else:
        node[last] = value


def remove(tree: dict[str, Any], key: str) -> None:
    """Take a dotted key out, in place; nothing happens when it is not there."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)


def without_key(keys: Collection[str], key: str) -> set[str]:
    """The dotted keys without this one and everything below it."""
    return {other for other in keys if other != key and not other.startswith(f"{key}.")}


def leaf_keys(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all values in the tree that are not themselves non-empty mappings."""
    keys: set[str] = set()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        keys |= leaf_keys(value, f"{key}.") if isinstance(value, dict) and value else {key}
    return keys


def _place(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"override '{key}': '{part}' must be a place, counted from 0, in a list of {len(items)}")
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-5` is a number, only true and false are booleans, no key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key '{key_node.value}' stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_OWN_RESOLVERS = {
    "tag:yaml.org,2002:bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "tag:yaml.org,2002:float": (re.compile(f"^({_FLOAT})$"), list("-+0123456789.")),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_RESOLVERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first_letters) in _OWN_RESOLVERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _first_letters)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{path}' cannot be read: {error}") from None
    tree = _parse(text, f"config file '{path}'")
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"config file '{path}' must hold 'key: value' lines, got a {type(tree).__name__} at the top")
    return tree
