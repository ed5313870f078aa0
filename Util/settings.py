"""Settings: a dataclass whose every field is a flag of a script, with its help text and its range.

    @dataclass(frozen=True, kw_only=True)
    class PruneSettings(Settings):
        ckpt: Path = setting(bundled.MODEL, "full-size checkpoint", metavar="FILE")
        n_sample: int = setting(400, "images to score by", low=1)

    add_flags(parser, PruneSettings)
    settings = from_flags(PruneSettings, vars(parser.parse_args()))   # or PruneSettings(n_sample=9)

The library takes settings, scripts make them from flags. What is wrong with one is a `SettingError`
that knows which; a script puts the two dashes before its name.
"""

import argparse
import math
import shlex
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints


class SettingError(ValueError):
    """A setting cannot be used; the message says what was found and what to do.

    Attributes:
        name: the setting's.
    """

    def __init__(self, name: str, message: object) -> None:
        super().__init__(f"{name} {message}")
        self.name = name


class VariableError(ValueError):
    """An environment variable cannot be used; the message names it."""


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Make any ValueError from the block one of a setting; one that is blamed already stays so."""
    try:
        yield
    except (SettingError, VariableError):
        raise
    except ValueError as error:
        raise SettingError(name, error) from None


def setting(
    default: Any,
    help: str,
    *,
    choices: Collection[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
    parse: Callable[[str], Any] | None = None,
    aliases: Sequence[str] = (),
    exists: str = "",
) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: its value where the flag is not given; ``...`` makes it required.
        help: what it is, with unit and range; the default is added.
        choices: the values it may have; a table may grow until the flag is made.
        low: smallest value.
        high: largest value.
        above: a value that it must exceed.
        below: a value that it must not reach.
        metavar: what stands for a value in the help text.
        nargs: "+" for values separated by spaces; a tuple is else separated by commas.
        parse: makes the value of a text; None follows the field's type.
        aliases: further names of the flag, as the original code has them.
        exists: what the value names, for the message of `check_files`, which looks whether it is
            there; "parser" may be a parser's name, too.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    flag = {"choices": choices, "metavar": metavar, "nargs": nargs, "parse": parse}
    metadata = {"help": help, "limits": limits, "aliases": aliases, "exists": exists, **flag}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: values out of their range are refused when an object is made.

    Raises:
        SettingError: names the setting, the value and the limit.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            if "help" in item.metadata:
                _check(item.name, getattr(self, item.name), item.metadata)


def check_files(settings: Any, *leave_out: str, values: Any = None) -> None:
    """Refuse files and folders that are not there, before anything is loaded.

    Args:
        settings: a dataclass of settings; its class, where ``values`` has what is looked for.
        leave_out: names of settings that are not looked at.
        values: of the settings; None takes them of ``settings``.

    Raises:
        SettingError: names the setting and the file.
    """
    for item in fields(settings):
        kind = item.metadata.get("exists")
        if not kind or item.name in leave_out:
            continue
        value = getattr(values or settings, item.name) or ()
        for path in value if isinstance(value, tuple) else (value,):
            is_name = kind == "parser" and (str(path) == "none" or ":" in str(path))
            if not is_name and not Path(path).exists():
                what = "file" if kind == "parser" else kind
                raise SettingError(item.name, f"{path}: no such {what}; check the name")


Kind = TypeVar("Kind")


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse a value that is not among the choices or out of the range of its setting."""
    choices, limits = metadata["choices"], metadata["limits"]
    if choices is not None and value is not None:
        for part in value if isinstance(value, tuple) else (value,):
            if part not in choices:
                raise SettingError(name, f"{part}: unknown; take {', '.join(map(str, choices))}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise SettingError(name, f"must be a finite number, not {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise SettingError(name, f"must be below 2^63, not {value}")
    problems = (
        ("at least", limits["low"], lambda limit: value < limit),
        ("at most", limits["high"], lambda limit: value > limit),
        ("above", limits["above"], lambda limit: value <= limit),
        ("below", limits["below"], lambda limit: value >= limit),
    )
    for words_, limit, broken in problems:
        if limit is not None and broken(limit):
            raise SettingError(name, f"must be {words_} {limit}, not {value}")


def _without_none(kind: Any) -> Any:
    """``int | None`` -> int."""
    if get_origin(kind) in (types.UnionType, Union):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    return kind


def _parse_of(kind: Any, nargs: str | None) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    if kind is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        if not nargs:
            several, letter = (integers, "N") if kind is int else (words, "NAME")
            return {"type": several, "metavar": f"{letter},{letter},..."}
    return {"type": file_path if kind is Path else kind}


def add_flags(parser: argparse.ArgumentParser, *kinds: type) -> None:
    """Add one flag for each field of dataclasses that is made with `setting`.

    A field of type bool becomes ``--flag``, ``--flag True`` or ``--flag False``.
    """
    for kind in kinds:
        hints = get_type_hints(kind)
        for item in fields(kind):
            if "help" in item.metadata:
                names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
                parser.add_argument(*names, **_flag(item, _without_none(hints[item.name])))


def _flag(item: Any, kind: Any) -> dict[str, Any]:
    metadata = item.metadata
    required = item.default is MISSING
    untold = required or item.default in (None, "", ()) or "default" in metadata["help"]
    options = {
        **({"required": True} if required else {"default": item.default}),
        "help": metadata["help"] + ("" if untold else f" (default: {_text(item.default)})"),
        **_parse_of(kind, metadata["nargs"]),
    }
    given = {"type": metadata["parse"], "metavar": metadata["metavar"], "nargs": metadata["nargs"]}
    options |= {key: value for key, value in given.items() if value is not None}
    if metadata["choices"] is not None:
        names = [str(choice) for choice in metadata["choices"]]
        options.setdefault("metavar", "{" + ",".join(names) + "}")
    return options


def from_flags(
    kind: type[Kind], values: Mapping[str, Any], options: Iterable[type[Settings]] = ()
) -> Kind:
    """Make settings of parsed flags, which may hold those of other settings too.

    Args:
        kind: of settings.
        values: of the flags, by name.
        options: kinds whose settings the field ``options`` gets, if there are any.

    Raises:
        SettingError: a value is out of its range.
    """
    chosen: dict[str, Any] = {}
    if options:
        chosen["options"] = tuple(from_flags(part, values) for part in options)
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in values and "help" in item.metadata:
            value = values[item.name]
            chosen[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**chosen)


def known_settings(
    saved: Mapping[str, Any], *kinds: type, source: str = "config.json"
) -> dict[str, Any]:
    """Those of stored values that are still settings, each of its type.

    Args:
        saved: values by name.
        kinds: of settings.
        source: where they come from, for messages.

    Raises:
        ValueError: one is of another type; names it.
    """
    found: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for item in fields(kind):
            if item.name in saved and "help" in item.metadata:
                found[item.name] = _typed(item.name, saved[item.name], hints[item.name], source)
    return found


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    """A stored value in its field's type; JSON has no tuples, no paths and integers for 1.0."""
    kind = _without_none(hint)
    if get_origin(kind) is tuple:
        value = tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, tuple) and all(type(v) is get_args(kind)[0] for v in value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    else:
        fits = type(value) is kind or (kind is float and type(value) is int)
        fits = fits or (value is None and kind is not hint)
    if not fits:
        raise ValueError(f"{source}: {name} is {value!r}, not {getattr(kind, '__name__', kind)}")
    return value


def chosen(options: Iterable[Settings], kind: type[Settings] | None) -> Settings | None:
    """The settings of a kind among several; its defaults where there are none, None for no kind."""
    if kind is None:
        return None
    return next((found for found in options if type(found) is kind), kind())


def _text(value: Any) -> str:
    """A value as it is written on a command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(
    script: str, settings: Settings, recipe: Mapping[str, Any] = types.MappingProxyType({})
) -> str:
    """The command line that means these settings: every one that is not the default.

    Args:
        script: what comes before the flags.
        settings: to be told.
        recipe: what the setting recipe means by itself, by name.
    """
    words_ = shlex.split(script)
    defaults = {**recipe, "recipe": ""}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if "help" in item.metadata and value != defaults.get(item.name, item.default):
            words_ += [f"--{item.name}", _text(value)]
    return shlex.join(words_)


def plain(settings: Any) -> dict[str, Any]:
    """Settings as values that JSON holds, by name."""
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def file_path(text: str) -> Path:
    """Argument type: a path; an empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return Path(text)


def file_or_folder(text: str) -> Path:
    """Argument type: a file to write, or a folder that is there to write one in."""
    if text.endswith("/") and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; make it first")
    return file_path(text)


def at_least(low: int) -> Callable[[str], int]:
    """Argument type: an integer that is not below a limit."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is not at least {low}")
        return value

    return integer


def boolean(text: str) -> bool:
    """Argument type: True or False; ``bool("False")`` would be true."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def integers(text: str) -> tuple[int, ...]:
    """Argument type: integers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not integers separated by commas") from None


def some_words(text: str) -> tuple[str, ...]:
    """Argument type: names separated by commas, at least one."""
    found = words(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is empty; name at least one")
    return found


def words(text: str) -> tuple[str, ...]:
    """Argument type: names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
