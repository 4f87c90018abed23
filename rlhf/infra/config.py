"""Typed configuration: a YAML file of differences, dotted overrides, and errors that say how to mend them.

The order of authority is: defaults in the class, then the file named by `extends`, then the file itself, then the
command line. Keys from the last two were *set by the user*; a config class can name the keys that have no effect in
the setting at hand (`Config.idle_keys`), and setting one of those is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.infra.config_errors import explain
from rlhf.infra.errors import UserError
from rlhf.infra.yaml_tree import SET_BY_USER, leaf_keys, parse_override, put, read_yaml_file


class Config(BaseModel):
    """Base of every configuration class: immutable, no unknown keys, no NaN or infinity, defaults checked too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def idle_keys(self) -> Mapping[str, str]:
        """Keys of this class (dotted, relative to it) that have no effect in this setting, each with the reason.

        Naming a section covers everything under it. `load_config` refuses such a key when the user set it; one that
        was left at its default or inherited through `extends` is ignored.
        """
        return {}


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Build a config of class `cls` from a YAML file of differences and `a.b=value` overrides, read as YAML.

    `extends: other.yaml` in the file names a second file, relative to the first, whose keys come before it. Raises
    `UserError` for a missing file, text that is not YAML, an unknown key, a value out of range, and a key that was set
    but cannot have an effect.
    """
    tree: dict[str, Any] = {}
    set_keys: set[str] = set()
    if path is not None:
        file = read_yaml_file(find_config_file(path))
        tree, set_keys = file.tree, set(file.set_keys)
    for text in overrides:
        key, value = parse_override(text)
        put(tree, key, value)
        set_keys |= leaf_keys({key: value})
    try:
        config = cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(cls, error)) from None
    config = _with_set_keys(config, set_keys)
    refuse_idle_keys(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, the keys that the user set listed last; loading it gives an equal config."""
    tree = config.model_dump(mode="json")
    tree[SET_BY_USER] = sorted(explicit_keys(config))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def explicit_keys(config: Config) -> frozenset[str]:
    """Dotted names of the keys that the user set, in the file, on the command line or in the constructor."""
    keys: set[str] = set()
    for name, value in config:
        if name in config.model_fields_set:
            below = explicit_keys(value) if isinstance(value, Config) else frozenset()
            keys |= {f"{name}.{key}" for key in below} or {name}
    return frozenset(keys)


def refuse_idle_keys(config: Config) -> None:
    """Raise `UserError` when a key that the user set cannot have an effect (see `Config.idle_keys`)."""
    set_keys = sorted(explicit_keys(config))
    for idle, reason in _all_idle_keys(config):
        for key in set_keys:
            if key == idle or key.startswith(f"{idle}."):
                raise UserError(
                    f"config key '{key}' has no effect here because {reason}; remove the key or change that"
                )


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
    for key, reason in config.idle_keys().items():
        yield f"{prefix}{key}", reason
    for name, value in config:
        if isinstance(value, Config):
            yield from _all_idle_keys(value, f"{prefix}{name}.")


def _with_set_keys(config: ConfigT, set_keys: set[str]) -> ConfigT:
    """A copy whose `model_fields_set`, section by section, holds exactly the keys that the user set."""
    values: dict[str, Any] = {}
    names: set[str] = set()
    for name, value in config:
        below = {key.removeprefix(f"{name}.") for key in set_keys if key.startswith(f"{name}.")}
        values[name] = _with_set_keys(value, below) if isinstance(value, Config) else value
        if below or name in set_keys:
            names.add(name)
    return type(config).model_construct(_fields_set=names, **values)
