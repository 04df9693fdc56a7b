"""Recipes: a run is a Python file with `def recipe() -> Recipe`, changed by `--section.field value` options.

In: the command line. Out: the resolved `Recipe`, which is printed, and written as `recipe.json` into the run folder.
"""

import dataclasses
import difflib
import importlib.util
import json
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
        ValueError: the file does not exist, has no `recipe`, or returns something else.
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
    return made


def override(recipe: Recipe, args: Sequence[str]) -> Recipe:
    """Replace fields named on the command line, such as `--data.sources.0.share 0.5`.

    Raises:
        ValueError: a field that does not exist.
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
    return tyro.cli(Recipe, prog="megavl.train RECIPE.py", default=recipe, args=list(args), config=config)


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
        ValueError: not JSON, or fields that this version does not know or misses.
    """
    try:
        return _build(Recipe, json.loads(Path(path).read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"recipe {path}: {error}") from error


def _build(kind: Any, value: Any) -> Any:
    """A value of type `kind` from plain JSON: dataclasses from objects, tuples from lists."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(o for o in options if o is not type(None)), value)
    if origin is tuple:
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else options
        return tuple(_build(k, v) for k, v in zip(inner, value, strict=True))
    if dataclasses.is_dataclass(kind):
        types_of = typing.get_type_hints(kind)
        # A name that is not a field reaches the constructor and is refused there by name.
        return kind(**{name: _build(types_of.get(name, object), item) for name, item in value.items()})  # type: ignore[operator]
    return value
