"""Recipes: a run is a Python file with `def recipe() -> Recipe`, changed by `--section.field value` options.

In: the command line. Out: the resolved `Recipe`, which is printed, and written as `recipe.json` into the run folder.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from megavl.config import Recipe

USAGE = (
    "usage: torchrun ... -m megavl.train RECIPE.py [--section.field value ...]   (RECIPE.py --help lists the fields)"
)


def parse_command_line(args: Sequence[str]) -> Recipe:
    """The recipe that `RECIPE.py [--section.field value ...]` describes.

    Raises:
        ValueError: no recipe file, or a field that does not exist (names the nearest one).
        SystemExit: tyro could not read a value (it prints which), or `--help`.
    """
    if not args or args[0].startswith("-"):
        raise ValueError(f"the first argument must be a recipe file\n{USAGE}")
    return override(load_recipe(args[0]), args[1:])


def load_recipe(path: str | Path) -> Recipe:
    """Run a recipe file and call its `recipe()`.

    While it runs, its folder and the one above can be imported from, so that recipes share a mixture.

    Raises:
        ValueError: the file does not exist, has no `recipe`, or returns something else; or a field has a value of
            another type, or none of its choices.
    """
    path = Path(path)
    if path.suffix == ".json":
        return load_recipe_json(path)
    if not path.is_file():
        raise ValueError(f"recipe {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"megavl_recipe_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by name
    before = list(sys.path)
    sys.path[:0] = [str(path.resolve().parent), str(path.resolve().parent.parent)]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    if not callable(getattr(module, "recipe", None)):
        raise ValueError(f"recipe {path}: the file has no function `recipe()`")
    made = module.recipe()
    if not isinstance(made, Recipe):
        raise ValueError(f"recipe {path}: recipe() returned {type(made).__name__} instead of Recipe")
    return _checked(made, f"recipe {path}")


def override(recipe: Recipe, args: Sequence[str]) -> Recipe:
    """Replace fields named on the command line, such as `--data.sources.0.share 0.5`.

    Raises:
        ValueError: a field that does not exist, or a number that is none.
    """
    known = {name.replace("_", "-") for name in _field_names(recipe)}
    for arg in args:
        name = arg.split("=")[0].removeprefix("--").replace("_", "-")
        if arg.startswith("--") and name not in known | {"help"}:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"--{name.replace('-', '_')} is not a field of the recipe; the nearest is --{nearest}")
    # No subcommands for `SamConfig | None`: a tower is added or removed in the recipe file. Booleans take a value like
    # every other field.
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    made = tyro.cli(Recipe, prog="megavl.train RECIPE.py", default=recipe, args=list(args), config=config)
    return _checked(made, "the command line")


def _field_names(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the leaves, as tyro names them."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _field_names(getattr(value, field.name), f"{prefix}.{field.name}")
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from _field_names(item, f"{prefix}.{index}")
    else:
        yield prefix.removeprefix(".")


def to_json(recipe: Recipe) -> str:
    """The resolved recipe as text."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe.json`, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(to_json(recipe))
    partial.replace(path)


def load_recipe_json(path: str | Path) -> Recipe:
    """Read `recipe.json` back into an equal `Recipe`.

    Raises:
        ValueError: not JSON, or fields that this version does not know or misses, or that have other types.
    """
    try:
        made = _build(Recipe, json.loads(Path(path).read_text(), object_pairs_hook=_without_duplicates))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    return _checked(made, f"recipe {path}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)} occurs twice")
    return table


def _build(kind: Any, value: Any) -> Any:
    """A value of type `kind` from plain JSON: dataclasses from objects, tuples from lists; what is neither stays."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(o for o in options if o is not type(None)), value)
    if origin is tuple and isinstance(value, list):
        inner = options[0] if options[-1] is Ellipsis else None
        return tuple(item if inner is None else _build(inner, item) for item in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types_of = typing.get_type_hints(kind)
        # A name that is not a field reaches the constructor and is refused there by name.
        return kind(**{name: _build(types_of.get(name, object), item) for name, item in value.items()})  # type: ignore[operator]
    return value


def _checked(recipe: Any, where: str) -> Recipe:
    """The recipe, if every field has a value of its type: neither a dataclass nor Python looks at them."""
    wrong = list(_wrong_values(Recipe, recipe, ""))
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    return recipe


def _wrong_values(kind: Any, value: Any, name: str) -> Iterator[str]:
    """A sentence for each field, `name` or below, that is not what its type `kind` says."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    found = f"{name or 'the recipe'} is {value!r:.80}"
    if origin in (types.UnionType, typing.Union):
        if value is not None:
            yield from _wrong_values(next(o for o in options if o is not type(None)), value, name)
    elif origin is typing.Literal:
        if not any(value == option and type(value) is type(option) for option in options):
            yield f"{found}, it can be {', '.join(map(repr, options))}"
    elif origin is tuple:
        inner = options[:1] * len(value) if options[-1] is Ellipsis and isinstance(value, tuple) else options
        if not isinstance(value, tuple) or len(value) != len(inner):
            yield f"{found}, not a tuple" + (f" of {len(options)} values" if options[-1] is not Ellipsis else "")
        else:
            for index, item in enumerate(value):
                yield from _wrong_values(inner[index], item, f"{name}.{index}")
    elif dataclasses.is_dataclass(kind):
        if type(value) is not kind:
            yield f"{found}, not a {kind.__name__}"  # type: ignore[union-attr]
        else:
            for field, of_field in typing.get_type_hints(kind).items():
                yield from _wrong_values(of_field, getattr(value, field), f"{name}.{field}".removeprefix("."))
    elif type(value) is not kind and not (kind is float and type(value) is int):
        yield f"{found}, not of type {kind.__name__}"
    elif kind is float and not math.isfinite(value):
        yield f"{found}, not a finite number"
