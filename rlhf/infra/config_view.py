"""A config for people and for editors: the resolved tree with a comment on every key, and the schema of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from rich.text import Text

from rlhf.infra.config import Config, explicit_keys, given_keys, idle_keys, origins, reason_why_idle
from rlhf.infra.yaml_tree import EXTENDS, INHERITED, SET_BY_USER

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_COMMENT_COLUMN = 44


@dataclass(frozen=True)
class Line:
    """One line of the tree: `name: value` behind its indent, where the value comes from, and what it means.

    `origin` is set, inherited or default; `default` is the class's own where the value differs from it, `idle` why the
    key is without effect, `in_effect` what the recipe takes instead. A section has no value, a line without a name is a
    comment of its own.
    """

    indent: str = ""
    name: str = ""
    value: str = ""
    origin: str = "default"
    default: str | None = None
    idle: str | None = None
    in_effect: str | None = None
    description: str = ""

    @property
    def setting(self) -> str:
        """The YAML of the line without its comment."""
        return f"{self.indent}{self.name}:{' ' if self.value else ''}{self.value}" if self.name else ""

    @property
    def comment(self) -> str:
        """Marks in brackets, then the description."""
        marks = [] if self.origin == "default" else [self.origin]
        marks += [] if self.default is None else [f"default {self.default}"]
        if self.idle is not None:
            marks.append(f"no effect: {self.idle}")
        elif self.in_effect is not None:
            marks.append(f"taken as {self.in_effect}")
        return " ".join(part for part in (f"[{'; '.join(marks)}]" if marks else "", self.description) if part)

    def plain(self) -> str:
        """The line as text, comments in one column where there is room."""
        comment = f"# {self.comment}" if self.comment else ""
        if not self.setting:
            return comment
        return f"{self.setting:<{_COMMENT_COLUMN}}  {comment}".rstrip() if self.value else f"{self.setting}  {comment}"

    def rich(self) -> Text:
        """The line for a terminal: what was set stands out, what has no effect stands back."""
        line, setting = Text(self.plain()), len(self.setting)
        style = {"set": "bold green", "inherited": "magenta", "default": ""}[self.origin]
        line.stylize("bold" if self.name and not self.value else style, 0, setting)
        line.stylize("dim", setting)
        if self.idle is not None:
            line.stylize("dim strike" if self.origin == "default" else "red", 0, setting)
        return line


def view(config: Config, recipe: str) -> Iterator[Line]:
    """The resolved tree, line by line; as text it is a config file that loads to an equal config.

    Its last keys keep which of the others were set: the rest may stand there without effect.
    """
    set_keys, given = explicit_keys(config), given_keys(config)
    counts = f"{len(set_keys)} set, {len(given - set_keys)} inherited through extends, the rest at their defaults"
    yield Line(description=f"rlhf {recipe}: {counts}")
    yield from _lines(config, config, "", "", given, set_keys, idle_keys(config))
    for name, keys in origins(config).items():
        yield Line(name=name, value=_flow(keys), description="kept so that idle defaults are not taken for choices")


def json_schema(cls: type[Config], recipe: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe's files, for completion and checks while typing."""
    schema = cls.model_json_schema()
    ours = {
        EXTENDS: {"type": "string", "description": "a file, relative to this one, whose keys come before those here"},
        SET_BY_USER: _names("written into a run's folder: the keys that a person chose; without it, all of them"),
        INHERITED: _names("written into a run's folder: the keys that an extended file brought"),
    }
    schema["properties"] = ours | schema["properties"]
    return {"$schema": DRAFT} | schema | {"title": f"rlhf {recipe}"}


def _lines(
    config: Config,
    in_effect: Config,
    indent: str,
    prefix: str,
    given: frozenset[str],
    set_keys: frozenset[str],
    idle: Mapping[str, str],
) -> Iterator[Line]:
    plain, used = config.model_dump(mode="json"), dict(in_effect.in_effect())
    for name, value in config:
        key, field = f"{prefix}{name}", type(config).model_fields[name]
        description = field.description or ""
        if isinstance(value, Config):
            yield Line(indent, name, idle=idle.get(key), description=description)
            yield from _lines(value, used[name], f"{indent}  ", f"{key}.", given, set_keys, idle)
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        yield Line(
            indent,
            name,
            _flow(plain[name]),
            "set" if key in set_keys else "inherited" if key in given else "default",
            None if default == value else "a section" if isinstance(default, Config) else _flow(_as_plain(default)),
            reason_why_idle(key, idle),
            None if used[name] == value else _flow(_as_plain(used[name])),
            description,
        )


def _as_plain(value: Any) -> Any:
    """A default as YAML knows it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _flow(value: Any) -> str:
    """A value as YAML on one line; JSON, which is YAML too, where it holds line breaks."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    text = text.strip().removesuffix("...").strip()
    return text if text.isprintable() else json.dumps(value)


def _names(description: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}, "description": description}
