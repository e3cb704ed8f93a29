"""Configuration: YAML files that include each other, dotted `key=value` on top, one frozen pydantic tree out.

Unknown keys, wrong values and missing keys fail with the key, its file and line, the nearest valid name and what is
allowed. Scalars follow YAML 1.2 where PyYAML follows 1.1: `off` is a word, `1e-4` is a number. A relative path in a
file is relative to that file; on the command line, to the working directory. `include: demo` takes one that ships.
"""
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from yaml.reader import ReaderError

from scgpt.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

CONFIG_KINDS = ("corpus", "model", "pretrain")   # folders of configs/
Location = tuple[str | int, ...]
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen group of settings; a key that no field declares is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic takes true for 1, so that `splits.valid: true` would hold out every cell."""
        kinds = set(_leaves(cls.model_fields[str(info.field_name)].annotation))
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError("a number is wanted, true and false are none")
        return value

    def to_yaml(self) -> str:
        """The resolved tree as YAML that `load_config` reads back to an equal tree."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


class _Word(str):
    """A word of a YAML file that remembers the folder it was read from."""

    __slots__ = ("folder",)
    folder: Path

    def __new__(cls, text: str, folder: Path) -> "_Word":
        word = super().__new__(cls, text)
        word.folder = folder
        return word


def _absolute(value: object) -> object:
    if isinstance(value, str) and "://" not in value:
        folder = value.folder if isinstance(value, _Word) else Path.cwd()
        return folder / Path(value).expanduser()
    return value


def _text(value: object) -> object:
    return str(value) if isinstance(value, Path | str) else value


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int | None:
    """Bytes of a size in words, `512MiB`, `2GB` or a plain number; None where it is no size."""
    match = _SIZE.fullmatch(text.strip())
    return int(float(match[1]) * _UNITS[(match[2] or "B").lower()]) if match else None


def _size(value: object) -> object:
    found = parse_bytes(value) if isinstance(value, str) else None
    return value if found is None else found


ConfigPath = Annotated[Path, BeforeValidator(_absolute)]   # resolved against the file it stands in
ConfigPlace = Annotated[str, BeforeValidator(lambda value: _text(_absolute(value)))]   # the same, or a URL, as text
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Bytes = Annotated[int, BeforeValidator(_size)]             # 512MiB, 2GB or a plain number of bytes


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (core schema)."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


class _Tree:
    """A nested dict, and for each key the file and line that set it last."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[Location, str] = {}

    def merge(self, values: Mapping[str, Any], origins: Mapping[Location, str]) -> None:
        _merge(self.values, values)
        self.origins.update(origins)

    def origin(self, location: Location) -> str | None:
        """Where `location`, or the closest key above it that is written down, was set; else the first key below it."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.origins:
                return self.origins[location[:end]]
        return next((origin for key, origin in self.origins.items() if key[:len(location)] == location), None)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = dict(value) if isinstance(value, Mapping) else value


def shipped_configs(kind: str) -> dict[str, Path]:
    """Name -> file of the configurations that ship under `configs/<kind>/`, sorted."""
    installed = Path(str(package_files("scgpt"))) / "configs"
    folder = (installed if installed.is_dir() else installed.parent.parent / "configs") / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(cls: type[C], config: str | Path, overrides: Sequence[str] = (), *, kind: str) -> C:
    """Read `config` (a YAML file, or the name of one that ships under `configs/<kind>/`), apply `key=value`, validate.

    Raises ConfigError for a missing file, malformed YAML, an unknown or wrong key.
    """
    tree = _Tree()
    _read(_find(config, kind), tree, (), kind)
    _override(tree, overrides)
    return validate(cls, tree.values, origin=tree.origin)


def read_values(path: Path, *, kind: str) -> dict[str, Any]:
    """The keys and values of a YAML file as they are, of whatever version; raises ConfigError where it is none."""
    tree = _Tree()
    _read(path, tree, (), kind)
    return tree.values


def config_of(cls: type[C], overrides: Sequence[str]) -> C:
    """The defaults of `cls` with `key=value` on top; raises ConfigError as load_config does."""
    tree = _Tree()
    _override(tree, overrides)
    return validate(cls, tree.values, origin=tree.origin)


def _override(tree: _Tree, overrides: Sequence[str]) -> None:
    for override in overrides:
        location, value = _parse_override(override)
        nested: dict[str, Any] = {}
        target = nested
        for key in location[:-1]:
            target = target.setdefault(key, {})
        target[location[-1]] = value
        tree.merge(nested, {tuple(location): f"command line: {_without_secrets(override)}"})


def _without_secrets(text: str) -> str:
    """What is shown of a setting: no `user:password@` of a URL, and nothing after the `?` of a web address."""
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\",}\]]*", r"\1", re.sub(r"://[^/@\s]*@", "://", text))


def validate(cls: type[C], values: Mapping[str, Any],
             origin: "typing.Callable[[Location], str | None]" = lambda location: None) -> C:
    """Build `cls` from plain values; the first fault becomes a ConfigError in one sentence."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _explain(cls, error, origin) from None


def _find(config: str | Path, kind: str) -> Path:
    path = Path(config)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        return path
    shipped = shipped_configs(kind)
    if str(config) in shipped:
        return shipped[str(config)]
    other = next((f", it is one of {other}" for other in CONFIG_KINDS if str(config) in shipped_configs(other)), "")
    raise ConfigError(f"there is no {kind} configuration '{config}'{other}",
                      fix=f"{did_you_mean(str(config), shipped)}give a YAML file or one of: {', '.join(shipped)}")


def _read(path: Path, tree: _Tree, seen: tuple[Path, ...], kind: str) -> None:
    path = path.resolve()
    if path in seen:
        raise ConfigError("a configuration includes itself", where=" > ".join(map(str, (*seen, path))),
                          fix="remove one include")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
        origins: dict[Location, str] = {}
        values = _construct(node, path, (), origins) if isinstance(node, yaml.MappingNode) else {}
    except OSError as error:
        raise ConfigError(f"the configuration cannot be read: {error.strerror}", where=str(path),
                          fix="give the path of a YAML file or the name of a configuration that ships") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {_reason(error)}", where=f"{path}{_position(error)}",
                          fix="mend the file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not YAML: it is no UTF-8 text, byte {error.start}", where=str(path),
                          fix="mend the file") from None
    except RecursionError as error:   # brackets by the thousand, or an alias of what it stands in
        raise ConfigError("it is nested without end", where=str(path), fix="mend the file") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("a configuration must be a mapping of keys", where=str(path), fix="write `key: value` lines")
    includes = values.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(include, str) for include in includes):
        raise ConfigError(f"wrong value of 'include' = {includes!r}", where=str(path),
                          fix="give the path of a YAML file, or a list of such paths")
    for include in includes:
        _read(path.parent / _find(include, kind), tree, (*seen, path), kind)   # what ships has an absolute path
    tree.merge(values, origins)


def _construct(node: yaml.Node, path: Path, location: Location, origins: dict[Location, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            below = (*location, key)
            line = f"{_short(path)}:{key_node.start_mark.line + 1}"
            if key in values:
                raise ConfigError(f"the key '{_dotted(below)}' is written twice", where=line,
                                  fix="remove one of the two")
            origins[below] = line
            values[key] = _construct(value_node, path, below, origins)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, path, (*location, index), origins) for index, item in enumerate(node.value)]
    value = _Loader("").construct_object(node)
    return _Word(value, path.parent) if isinstance(value, str) else value


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{_without_secrets(override)}' is not a setting", where="command line",
                          fix="write key=value, for example seed=1")
    try:
        return key.split("."), yaml.load(text, _Loader)  # noqa: S506 our loader is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the value of '{key}' is not YAML: {_reason(error)}", where="command line",
                          fix="quote it, or mend the brackets") from None


def _reason(error: Exception) -> str:
    """Why a text is no YAML, without what it says there, which may hold a secret: PyYAML quotes up to its end."""
    if isinstance(error, RecursionError):
        return "it is nested without end"
    if isinstance(error, ReaderError):   # a class of its own, for signs that no YAML may hold
        return "it holds a control character"
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    text = " ".join(": ".join(parts).split()) or "it cannot be parsed"
    # Signs (':') and kinds of tokens ('<scalar>') stay; names of aliases, anchors and tags are the file's own words.
    return re.sub(r"""\s*(['"])(.*?)\1""", lambda found: found[0] if len(found[2]) <= 2 or found[2][0] == "<" else "",
                  text)


def _position(error: yaml.YAMLError) -> str:
    """`:LINE:COLUMN` of a fault, from 1; nothing where it is not known."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"


def _explain(cls: type[Config], error: ValidationError,
             origin: "typing.Callable[[Location], str | None]") -> ConfigError:
    fault = _meant(error.errors())
    location = _written(cls, fault["loc"])
    dotted, where = _dotted(location), origin(location)
    if fault["type"] == "extra_forbidden":
        names = _field_names(cls, location[:-1])
        return ConfigError(f"unknown key '{dotted}'", where=where,
                           fix=f"{did_you_mean(str(location[-1]), names) or 'remove it. '}Allowed: {', '.join(names)}.")
    if fault["type"] == "missing":
        below = [f"{dotted}.{name}" for name in _field_names(cls, location, required=True, within_lists=False)]
        return ConfigError(f"the key '{' and '.join(below) or dotted}' is missing", where=where,
                           fix=f"set it in the file or give {' '.join(f'{key}=...' for key in below or [dotted])}")
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(cause.what, where=cause.where or where, fix=cause.fix)
    wanted = fault["type"] in {"list_type", "tuple_type"}
    message = "a list is wanted, in brackets" if wanted else str(cause) if cause is not None else fault["msg"]
    if fault["type"] == "model_type":
        message = f"keys are wanted: {', '.join(_field_names(cls, location))}"
    named = dotted and not isinstance(fault["input"], Mapping)
    shown = f"'{dotted}'" + (f" = {_without_secrets(repr(fault['input'])):.200}" if named else "")
    return ConfigError(f"wrong value of {shown}: {message[:1].lower()}{message[1:]}", where=where, fix="mend the value")


def _meant(faults: "Sequence[ErrorDetails]") -> "ErrorDetails":
    """The first fault, keys that are missing last: a mistyped key is unknown, and missing under its right name.

    Where branches of a union tell one each, that of the branch that was meant: its fault is another than that of the
    value's type, or lies further inside.
    """
    faults = sorted(faults, key=lambda fault: fault["type"] == "missing")
    first = faults[0]["loc"]
    tag = next((place for place, part in enumerate(first) if _is_union_tag(part)), None)
    if tag is None:
        return faults[0]
    return max((fault for fault in faults if fault["loc"][:tag] == first[:tag]),
               key=lambda fault: (not fault["type"].endswith("_type"), len(fault["loc"])))


def _written(cls: type[Config], location: Location) -> Location:
    """A location without the branches of unions that pydantic names in it; a field may be called `path` as they are."""
    written: Location = ()
    for part in location:
        if not _is_union_tag(part) or part in _field_names(cls, written):
            written += (part,)
    return written


def _is_union_tag(part: str | int) -> bool:
    """Pydantic names the branch of a union inside a location; users never wrote that."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part
                                      or part.startswith(("constrained-", "function-", "lax-or-strict"))
                                      or part in {"str", "int", "float", "bool", "path"})


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of `names` as the beginning of a remedy, `did you mean 'x'? `; nothing where none is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'? " if close else ""


def _field_names(cls: type[Config], location: Location, *, required: bool = False,
                 within_lists: bool = True) -> list[str]:
    groups: list[type[Config]] = [cls]
    for part in location:
        if isinstance(part, str):
            fields = [group.model_fields[part].annotation for group in groups if part in group.model_fields]
            groups = [found for annotation in fields for found in _configs_in(annotation, within_lists=within_lists)]
    return [name for group in groups for name, field in group.model_fields.items()
            if field.is_required() or not required]


def _configs_in(annotation: Any, *, within_lists: bool) -> list[type[Config]]:
    if (isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
            and issubclass(annotation, Config)):
        return [annotation]
    if typing.get_origin(annotation) is list and not within_lists:
        return []
    return [found for part in typing.get_args(annotation) for found in _configs_in(part, within_lists=within_lists)]


def _leaves(annotation: Any) -> list[Any]:
    """The types that unions, lists and literals in an annotation are made of."""
    if typing.get_origin(annotation) is Literal:
        return [type(value) for value in typing.get_args(annotation)]
    return [leaf for part in typing.get_args(annotation) for leaf in _leaves(part)] or [annotation]


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
