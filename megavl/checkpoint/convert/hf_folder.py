"""The formats `hf-deepseek` and `hf-transformers`: a folder with `config.json`, weights, tokenizer and processor files.

In: a folder of either dialect, or `Contents`. Out: `Contents`, or a folder that `from_pretrained` (or the released
code) loads. Weights are safetensors or `.bin`, one file or shards with an index.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megavl.checkpoint.convert import carried, hf_files
from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Format, Progress, Slice, WriteOptions
from megavl.checkpoint.convert.hf_config import deepseek_config, read_config, transformers_config
from megavl.checkpoint.convert.hf_weights import find_file, find_weights, read_weights
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import plan_shards, write_shards
from megavl.checkpoint.convert.shapes import check_shapes
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.hf_names import Dialect, from_megavl, to_megavl, transformers_dialect, unused_names

_DEEPSEEK = "multi_modality"


def detect_deepseek(path: Path) -> bool:
    """Whether the folder's `config.json` is the released one's kind, or unreadable beside weights."""
    return _model_type(path) in (_DEEPSEEK, "")


def detect_transformers(path: Path) -> bool:
    """Whether the folder's `config.json` is of transformers' DeepSeek-VL."""
    return _model_type(path).startswith("deepseek_vl")


def _model_type(path: Path) -> str:
    """`model_type`; empty: weights beside an unreadable configuration; `none`: no Hugging Face folder."""
    try:
        return str(hf_files.read_json(path / hf_files.CONFIG).get("model_type", "none"))
    except CheckpointError:
        weights = any(next(path.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))
        return "" if weights and (path / hf_files.CONFIG).exists() else "none"


def read(path: Path) -> Contents:
    """Sizes, tensors by our names, unused tensors and files to hand on.

    Raises:
        CheckpointError: something is missing, damaged, leads outside the folder, or is of another model.
    """
    known = {name: file for name in hf_files.KNOWN if (file := find_file(path, name)) is not None}
    config = hf_files.read_json(known.get(hf_files.CONFIG, path / hf_files.CONFIG))
    try:
        model = read_config(config, _background(known))
        state = read_weights(path)
        if config["model_type"] == _DEEPSEEK:
            unused = {name: state[name] for name in unused_names(model) if name in state}
            tensors = to_megavl(state, model, "original")
        else:
            unused = carried.read_unused(path)
            tensors = to_megavl(state, model, transformers_dialect(state))
        check_shapes(tensors, model)
    except ValueError as error:  # CheckpointError too; what the folder is stands first
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    return Contents(model=model, tensors=tensors, unused=unused, files=known)


def _background(known: dict[str, Path]) -> list[int] | None:
    """The colour that pads an image, where the preprocessor's file tells it."""
    if hf_files.PREPROCESSOR not in known:
        return None
    table = hf_files.read_json(known[hf_files.PREPROCESSOR])
    if "background_color" in table:
        return list(table["background_color"])
    mean = table.get("high_res_image_mean", table.get("image_mean"))
    return [int(255 * value) for value in mean] if mean else None


def _state(contents: Contents, dialect: Dialect) -> dict[str, LazyTensor]:
    """Tensors by the dialect's names, in the order in which they are written."""
    try:
        state = from_megavl(contents.tensors, contents.model, dialect)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return {**state, **contents.unused} if dialect == "original" else state


def _dialect(options: WriteOptions) -> Dialect:
    return "transformers" if options.names == "5" else "transformers-4"


def write_deepseek(contents: Contents, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write the released repositories' files.

    Raises:
        CheckpointError: the model has no name there, the disk is full, or a source cannot be read.
    """
    state = _state(contents, "original")
    dtype = next(iter(contents.tensors.values())).dtype
    hf_files.write_json(folder / hf_files.CONFIG, deepseek_config(contents.model, dtype))
    hf_files.write_files(contents.files, folder, contents.model, "deepseek")
    write_shards(state, folder, progress)


def write_transformers(contents: Contents, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write what `from_pretrained` wants; unused tensors lie beside it, as transformers has no place for them.

    Raises:
        CheckpointError: transformers cannot express the model, the disk is full, or a source cannot be read.
    """
    state = _state(contents, _dialect(options))
    dtype = next(iter(contents.tensors.values())).dtype
    config = transformers_config(contents.model, dtype, options.names, hf_files.image_id(contents.files))
    hf_files.write_json(folder / hf_files.CONFIG, config)
    hf_files.write_files(contents.files, folder, contents.model, "transformers")
    write_shards(state, folder, progress)
    carried.write_unused(contents, folder, progress)


def plan_deepseek(contents: Contents, options: WriteOptions) -> Iterator[Slice]:
    """Every tensor and its file."""
    return _slices(_state(contents, "original"))


def plan_transformers(contents: Contents, options: WriteOptions) -> Iterator[Slice]:
    """Every tensor and its file."""
    dtype = next(iter(contents.tensors.values())).dtype
    transformers_config(contents.model, dtype, options.names, hf_files.RELEASED_IMAGE_ID)  # refuses what it must
    yield from _slices(_state(contents, _dialect(options)))
    for name, tensor in contents.unused.items():
        yield Slice(name=name, shape=tensor.shape, dtype=tensor.dtype, file=carried.UNUSED)


def _slices(state: dict[str, LazyTensor]) -> Iterator[Slice]:
    for file, names in plan_shards(state).items():
        for name in names:
            yield Slice(name=name, shape=state[name].shape, dtype=state[name].dtype, file=file)


def describe(path: Path) -> str:
    """Which names, and in how many files."""
    names = "original names"
    if detect_transformers(path):
        old = transformers_dialect(read_weights(path)) == "transformers-4"
        names = f"names of transformers {'4.56' if old else '5'}"
    return f"{names}, {len(find_weights(path))} file(s)"


DEEPSEEK = Format(
    name="hf-deepseek",
    detect=detect_deepseek,
    read=read,
    write=write_deepseek,
    plan=plan_deepseek,
    describe=describe,
    carries=True,
)
TRANSFORMERS = replace(
    DEEPSEEK,
    name="hf-transformers",
    detect=detect_transformers,
    write=write_transformers,
    plan=plan_transformers,
)
