"""Typed configuration: a YAML file of differences, dotted overrides, and errors that say how to mend them.

The order of authority is: defaults in the class, then the file named by `extends`, then the file itself, then the
command line. Keys from the last two were *set by the user*, those from `extends` are *inherited*; a config class can
name the keys that have no effect in the setting at hand (`Config.idle_keys`), and setting one of those is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from typing_extensions import Self

from rlhf.infra.config_errors import MAX_PROBLEMS_TOLD, accepts_null, explain, known_keys
from rlhf.infra.errors import UserError
from rlhf.infra.yaml_tree import (
    INHERITED,
    SET_BY_USER,
    leaf_keys,
    parse_override,
    put,
    read_yaml_file,
    remove,
    without_key,
)


class Config(BaseModel):
    """Base of every configuration class: immutable, no unknown keys, no NaN or infinity, defaults checked too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    _inherited: frozenset[str] = PrivateAttr(frozenset())  # names of this section's fields that `extends` brought

    def idle_keys(self) -> Mapping[str, str]:
        """Keys of this class (dotted, relative to it) that have no effect in this setting, each with the reason.

        Naming a section covers everything under it. `load_config` refuses such a key when the user set it; one that
        was left at its default or inherited through `extends` is ignored.
        """
        return {}

    def in_effect(self) -> Self:
        """The config as it will be used, where the recipe fills in or replaces settings before it looks at them.

        What is idle is asked of this one: a stage of a pipeline reads the pipeline's data, not those of its section.
        """
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Pydantic's copy, but what `update` names does not count as set by the user: a program filled it in."""
        copied = super().model_copy(update=update, deep=deep)
        object.__setattr__(copied, "__pydantic_fields_set__", set(self.model_fields_set))
        return copied


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Build a config of class `cls` from a YAML file of differences and `a.b=value` overrides, read as YAML.

    `extends: other.yaml` in the file names a second file, relative to the first, whose keys come before it. Raises
    `UserError` for a missing file, text that is not YAML, an unknown key, a value out of range, and a key that was set
    but cannot have an effect. A key of the file that the command line made idle was overruled, not set in error.
    """
    tree: dict[str, Any] = {}
    set_keys: set[str] = set()
    inherited: set[str] = set()
    if path is not None:
        file = read_yaml_file(find_config_file(path))
        tree, set_keys, inherited = deepcopy(file.tree), set(file.set_keys), set(file.inherited_keys)
    fields, given_now = known_keys(cls), set[str]()
    for text in overrides:
        key, value = parse_override(text)
        given_now |= leaf_keys({key: value})
        set_keys, inherited = without_key(set_keys, key), without_key(inherited, key)
        if value is None and key in fields and not accepts_null(fields[key]):
            remove(tree, key)
            continue
        put(tree, key, value)
        set_keys |= leaf_keys({key: value})
    try:
        config = cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(cls, error)) from None
    config = _with_origins(config, set_keys, inherited)
    if overrides and path is not None:
        overtaken = _overtaken_keys(config, file.tree, given_now)
        config = _with_origins(config, set_keys - overtaken, inherited | overtaken)
    refuse_idle_keys(config)
    return config


def _overtaken_keys(config: Config, file_tree: Mapping[str, Any], given_now: set[str]) -> set[str]:
    """Keys of the file that the command line made idle: it has the last word, so they count as inherited.

    A key that has no effect in the file as it stands is none of them; nor is one that the command line itself gives.
    """
    try:
        by_itself = idle_keys(type(config).model_validate(file_tree))
    except ValidationError:  # the file needs the command line to be complete
        by_itself = {}
    now = idle_keys(config)
    return {
        key
        for key in explicit_keys(config) - given_now
        if reason_why_idle(key, now) is not None and reason_why_idle(key, by_itself) is None
    }


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, the names of keys set and inherited at its end; loading it gives an equal config."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree | origins(config), sort_keys=False, allow_unicode=True, width=120)


def origins(config: Config) -> dict[str, list[str]]:
    """Which keys the user set and which `extends` brought, as a resolved file keeps them."""
    set_keys = explicit_keys(config)
    inherited = sorted(given_keys(config) - set_keys)
    return {SET_BY_USER: sorted(set_keys)} | ({INHERITED: inherited} if inherited else {})


def explicit_keys(config: Config) -> frozenset[str]:
    """Dotted names of the keys that the user set, in the file, on the command line or in the constructor."""
    return _keys_from(config, inherited_too=False)


def given_keys(config: Config) -> frozenset[str]:
    """Dotted names of the keys that do not stand at their default by themselves: set by the user or inherited."""
    return _keys_from(config, inherited_too=True)


def idle_keys(config: Config) -> dict[str, str]:
    """Dotted names of all keys and sections that have no effect as the config stands, each with the reason."""
    return dict(_all_idle_keys(config))


def refuse_idle_keys(config: Config) -> None:
    """Raise `UserError` when a key that the user set cannot have an effect (see `Config.idle_keys`).

    A key that was set to null says nothing, so it is let pass.
    """
    told = []
    idle = idle_keys(config)
    for key in sorted(explicit_keys(config)):
        reason = reason_why_idle(key, idle)
        if reason is not None and _value_of(config, key) is not None:
            told.append(f"config key '{key}' has no effect here because {reason}")
    if told:
        more = f"; and {len(told) - MAX_PROBLEMS_TOLD} more" if len(told) > MAX_PROBLEMS_TOLD else ""
        raise UserError(
            "; ".join(told[:MAX_PROBLEMS_TOLD]) + more + "; remove the key (KEY=null takes it back) or change that"
        )


def reason_why_idle(key: str, idle: Mapping[str, str]) -> str | None:
    """Why a key is without effect, by its own name or that of a section it stands in; None where it has one."""
    parts = key.split(".")
    return next((idle[name] for n in range(1, len(parts) + 1) if (name := ".".join(parts[:n])) in idle), None)


def find_config_file(path: str | Path) -> Path:
    """The file itself, or else the bundled one of that name (`configs/demo.yaml` or `demo.yaml`)."""
    given = Path(path)
    if given.is_file():
        return given
    package = Path(__file__).parent.parent
    bundled = [package / "configs", package.parent / "configs"]  # in an installed wheel; beside the source
    if given.parent in (Path("."), Path("configs")):
        for folder in bundled:
            if (folder / given.name).is_file():
                return folder / given.name
    names = sorted({file.name for folder in bundled for file in folder.glob("*.yaml")})
    raise UserError(f"config file '{given}' does not exist; the bundled ones are: {', '.join(names) or 'none'}")


def _all_idle_keys(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    config = config.in_effect()
    for name, value in config:
        if isinstance(value, Config):
            yield from _all_idle_keys(value, f"{prefix}{name}.")
    for key, reason in config.idle_keys().items():  # last: what the whole knows outdoes what a section knows
        yield f"{prefix}{key}", reason


def _keys_from(config: Config, *, inherited_too: bool) -> frozenset[str]:
    keys: set[str] = set()
    names = config.model_fields_set | (config._inherited if inherited_too else frozenset())
    for name, value in config:
        if name in names:
            below = _keys_from(value, inherited_too=inherited_too) if isinstance(value, Config) else frozenset()
            # A section that holds inherited keys alone was not set itself.
            keys |= {f"{name}.{key}" for key in below} or {name}
    return frozenset(keys)


def _value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = dict(value)[name]
    return value


def _with_origins(config: ConfigT, set_keys: set[str], inherited: set[str]) -> ConfigT:
    """A copy that knows, section by section, exactly which keys the user set and which were inherited."""
    values: dict[str, Any] = {}
    origin: dict[str, set[str]] = {"set": set(), "inherited": set()}
    for name, value in config:
        below_set, below_inherited = _below(set_keys, name), _below(inherited, name)
        is_section = isinstance(value, Config)
        values[name] = _with_origins(value, below_set, below_inherited) if is_section else value
        if below_set or name in set_keys:
            origin["set"].add(name)
        if (below_inherited or name in inherited) and (is_section or name not in origin["set"]):
            origin["inherited"].add(name)
    copied = type(config).model_construct(_fields_set=origin["set"], **values)
    copied._inherited = frozenset(origin["inherited"])
    return copied


def _below(keys: set[str], section: str) -> set[str]:
    return {key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")}
