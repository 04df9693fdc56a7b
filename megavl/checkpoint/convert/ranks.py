"""The format `megatron-ranks`: Megatron-LM's folder, one file per model-parallel rank.

In: such a folder, or `Contents` and a layout. Out: `Contents`, or the folder.

    latest_checkpointed_iteration.txt          the newest iteration, or `release`: weights without a run
    iter_0000123/mp_rank_TT[_PPP]/model_optim_rng.pt

A rank file is what `torch.save` makes of a dict:

    checkpoint_version   3.0
    iteration            steps done
    args                 sizes and layout, a dict: Megatron-LM's Namespace is a class, and a file that asks for
                         classes is refused (`torch_file.py`)
    model, or model0, model1, ... with virtual stages: local name -> this rank's part of the weights
    optimizer            the same keys -> kind (exp_avg, exp_avg_sq, param) -> local name -> part; only with a run
    state                the run's description, as `state.json`; only with a run
"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Format, Progress, Slice, WriteOptions
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.rank_layout import RankLayout, Slab, cut_of, local_shape, rank_layout, slabs
from megavl.checkpoint.convert.rank_read import FILE, VERSION, read_layout, read_rank_files
from megavl.checkpoint.convert.rank_write import Part, write_rank_files
from megavl.checkpoint.convert.shapes import check_shapes
from megavl.checkpoint.convert.training import description_of, training_from
from megavl.checkpoint.folder import CheckpointError, write_durably
from megavl.config import ModelConfig

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def detect(path: Path) -> bool:
    """Whether the path is Megatron-LM's folder, or one iteration of it."""
    return (path / LATEST).is_file() or any(path.glob("mp_rank_*"))


def read(path: Path) -> Contents:
    """Whole tensors, sizes and training state.

    Args:
        path: the folder, of which the newest iteration is read, or one iteration in it.

    Raises:
        CheckpointError: a file is missing, damaged, asks for code, or does not fit the others.
    """
    folder = _iteration(path)
    found = read_rank_files(folder)
    training = training_from(found.state, found.optimizer, folder) if found.state is not None else None
    return Contents(model=found.model, tensors=found.tensors, training=training)


def write(contents: Contents, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write the folder at the layout `options.parallel`.

    Raises:
        CheckpointError: the layout does not fit the model, or a tensor cannot be read.
        OSError: the file system refused.
    """
    layout = rank_layout(contents.model, options.parallel)
    check_shapes(contents.tensors, contents.model)
    name = _iteration_name(contents)
    files = {
        folder / name / layout.folder_of(*ranks) / FILE: _rank_content(contents, layout, *ranks)
        for ranks in layout.ranks()
    }
    write_rank_files(files, progress)
    write_durably(folder / LATEST, name.removeprefix("iter_").lstrip("0") or "0")


def plan(contents: Contents, options: WriteOptions) -> Iterator[Slice]:
    """Every rank's part of every tensor.

    Raises:
        CheckpointError: the layout does not fit the model.
    """
    layout = rank_layout(contents.model, options.parallel)
    check_shapes(contents.tensors, contents.model)
    for ranks in layout.ranks():
        content = _rank_content(contents, layout, *ranks)
        file = f"{_iteration_name(contents)}/{layout.folder_of(*ranks)}/{FILE}"
        for name, part in _parts(content, ()):
            whole = part.shape == part.source.shape
            where = "" if whole else ", ".join(map(_in_words, part.slabs))
            yield Slice(name=name, shape=part.shape, dtype=part.source.dtype, file=file, part=where)


def describe(path: Path) -> str:
    """The layout in words."""
    _, layout = read_layout(_iteration(path))
    virtual = f", virtual pipeline {layout.virtual}" if layout.virtual > 1 else ""
    return f"tensor {layout.tensor}, pipeline {layout.pipeline}{virtual}, layers {','.join(map(str, layout.split))}"


def _iteration(path: Path) -> Path:
    """The folder of rank files that a user means."""
    if any(path.glob("mp_rank_*")):
        return path
    try:
        latest = (path / LATEST).read_text().strip()
    except OSError as error:
        raise CheckpointError(f"{path / LATEST}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path / LATEST}: not text") from None
    if not re.fullmatch(rf"\d+|{RELEASE}", latest):
        raise CheckpointError(f"{path / LATEST}: {latest[:40]!r} is neither a number nor {RELEASE!r}")
    folder = path / (latest if latest == RELEASE else f"iter_{int(latest):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing, {LATEST} names it")
    return folder


def _iteration_name(contents: Contents) -> str:
    return f"iter_{contents.training.step:07d}" if contents.training else RELEASE


def _rank_content(contents: Contents, layout: RankLayout, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
    """What the file of a rank holds, with a `Part` for every tensor."""
    content: dict[str, Any] = {
        "checkpoint_version": VERSION,
        "iteration": contents.training.step if contents.training else 0,
        "args": _args(contents.model, layout),
    }
    keys = {place: layout.key_of(place) for place in layout.places_of(pipeline_rank)}
    content |= {key: {} for key in keys.values()}
    if contents.training:
        content["optimizer"] = {key: {} for key in keys.values()}
        content["state"] = description_of(contents.training)
    for name, tensor in contents.tensors.items():
        place, local = layout.place_of(name)
        if place in keys:
            content[keys[place]][local] = _part(tensor, name, layout, tensor_rank)
    for full, tensor in (contents.training.optimizer if contents.training else {}).items():
        kind, name = full.split(".", 1)
        place, local = layout.place_of(name)
        if place in keys:
            of_kind = content["optimizer"][keys[place]].setdefault(kind, {})
            of_kind[local] = _part(tensor, name, layout, tensor_rank)
    return content


def _part(tensor: LazyTensor, name: str, layout: RankLayout, tensor_rank: int) -> Part:
    cut = cut_of(name)
    return Part(
        source=tensor,
        slabs=slabs(tensor.shape, cut, layout.tensor, tensor_rank),
        shape=local_shape(tensor.shape, cut, layout.tensor),
    )


def _parts(content: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Part]]:
    """Every part with its keys joined by dots."""
    for key, value in content.items():
        if isinstance(value, Part):
            yield ".".join((*above, key)), value
        elif isinstance(value, dict):
            yield from _parts(value, (*above, key))


def _in_words(slab: Slab) -> str:
    """Rows and columns of a full tensor."""
    columns = f", columns {slab.columns.start}..{slab.columns.stop - 1}" if slab.columns else ""
    return f"rows {slab.first}..{slab.stop - 1}{columns}"


def _args(model: ModelConfig, layout: RankLayout) -> dict[str, Any]:
    """Sizes and layout under Megatron-LM's names, and what it has no name for."""
    decoder = model.decoder
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "decoder_layers_per_stage": list(layout.split),
        "num_layers": decoder.layers,
        "hidden_size": decoder.hidden,
        "ffn_hidden_size": decoder.ffn,
        "num_attention_heads": decoder.heads,
        "num_query_groups": decoder.kv_heads,
        "padded_vocab_size": decoder.vocab,
        "max_position_embeddings": decoder.max_positions,
        "rotary_base": decoder.rope_theta,
        "norm_epsilon": decoder.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "model": asdict(model),
    }


FORMAT = Format(name="megatron-ranks", detect=detect, read=read, write=write, plan=plan, describe=describe)
