"""The sizes of a model as plain values, as checkpoints keep them.

In: what JSON or a rank file holds under the names of `ModelConfig`'s fields. Out: a `ModelConfig` whose every field has
the type it must have.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

MODEL_FILE = "model.json"
"""The file of a checkpoint folder that holds the sizes."""


def read_sizes(path: Path) -> ModelConfig:
    """The sizes in a JSON file.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    return sizes_from(content, str(path))


def sizes_from(content: Any, where: str) -> ModelConfig:
    """The sizes in plain values, from `dataclasses.asdict` and back from a file.

    Args:
        content: field -> value.
        where: for error messages.

    Raises:
        CheckpointError: a field is unknown, missing or of another type.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: {type(content).__name__} instead of the model's sizes")
    parts: dict[str, Any] = dict(content)
    for name, kind in (("decoder", DecoderConfig), ("siglip", SiglipConfig), ("sam", SamConfig)):
        if isinstance(parts.get(name), Mapping):
            parts[name] = _section(kind, parts[name], f"{where}.{name}")
    model = _section(ModelConfig, parts, where)
    if not isinstance(model.decoder, DecoderConfig) or not isinstance(model.siglip, SiglipConfig):
        raise CheckpointError(f"{where}: decoder and siglip must be sections of sizes")
    return model


def _section(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    """One dataclass, its lists as tuples."""
    unknown = sorted(set(content) - {field.name for field in fields(kind)})
    if unknown:
        raise CheckpointError(f"{where}: unknown fields {unknown}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    for field in fields(kind):
        wanted: Any = {int: int, float: (int, float)}.get(cast(type, field.type))
        if wanted and field.name in values and not isinstance(values[field.name], wanted):
            raise CheckpointError(f"{where}.{field.name} is {values[field.name]!r}, not a number of its kind")
    try:
        return kind(**values)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from None
