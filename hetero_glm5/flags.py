"""A flag is a field: argparse options, --help and the checks are generated from a frozen dataclass's fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any, TypeVar

from hetero_glm5.core import UserError


class ConfigError(UserError):
    """A flag or a value in config.json that cannot be used."""


def flag(
    default: Any, help: str, *, names: str = "", choices: tuple[str, ...] = (), at_least: float | None = None
) -> Any:
    """A config field that is a command-line flag. `names`: the spellings, if other than --field-name."""
    return field(default=default, metadata={"help": help, "names": names, "choices": choices, "at_least": at_least})


def _spellings(f: dataclasses.Field[Any]) -> list[str]:
    return (f.metadata["names"] or "--" + f.name.replace("_", "-")).split()


def _kind(cls: type, f: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The field's plain type, and whether it is a tuple of it: `tuple[int, ...] | None` is (int, True)."""
    hint = typing.get_type_hints(cls)[f.name]
    for option in typing.get_args(hint):
        if option is not type(None):
            hint = option
            break
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One flag for each field of `cls`; the type, default, choices and help come from the field."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(cls):
        kind, many = _kind(cls, f)
        options: dict[str, Any] = {"dest": f.name, "default": f.default, "help": f.metadata["help"].replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            options["type"] = kind
            options["metavar"] = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else kind.__name__
            if many:
                options["nargs"] = "+"
        group.add_argument(*_spellings(f), **options)


def from_args(cls: type[C], args: argparse.Namespace) -> C:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def to_args(config: Flags) -> list[str]:
    """The command line that from_args reads as `config`: the flags that are not at their default."""
    words: list[str] = []
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, f.name), _spellings(f)[0]
        if value == f.default:
            continue
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name.removeprefix('--')}")
        else:
            words += [name, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def did_you_mean(word: str, known: Iterable[str], otherwise: str = ".") -> str:
    """The end of a sentence about an unknown word: the closest known one, or `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else otherwise


def nearest_flag(unknown: str, known: list[str]) -> str:
    """A sentence for an unknown flag, with the closest known spelling."""
    name = unknown.split("=")[0]
    return f"unknown flag {name}{did_you_mean(name, known, '. --help lists them all.')}"


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _fits(value: Any, kind: type, many: bool) -> bool:
    if many:
        return isinstance(value, tuple) and all(_fits(v, kind, False) for v in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


class Flags:
    """Checks that every flag class shares: choices and lower bounds."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, meta, name = getattr(self, f.name), f.metadata, _spellings(f)[0]
            if value is None and f.default is None:
                continue
            kind, many = _kind(type(self), f)
            if not _fits(value, kind, many):
                raise ConfigError(f"{name} is {value!r}; it must be {_KINDS[kind]}{' (several)' if many else ''}.")
            if meta["choices"] and value not in meta["choices"]:
                hint = did_you_mean(value, meta["choices"])
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(meta['choices'])}{hint}")
            if meta["at_least"] is not None and not value >= meta["at_least"]:
                raise ConfigError(f"{name} is {value}; it must be at least {meta['at_least']}.")


C = TypeVar("C", bound=Flags)
