r"""What a checkpoint of any format holds, and where two checkpoints differ.

    tools/inspect_checkpoint.py runs/stage3
    tools/inspect_checkpoint.py deepseek-vl-7b-base/ export/

With one checkpoint: format, layout, size, step, parameters and types per module. With two, in whatever formats: the
first tensor that differs, and how many do. Exit status: 0, or 1 if a checkpoint cannot be read or the two differ.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Format
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.run import open_checkpoint
from megavl.checkpoint.convert.safetensors_file import pieces
from megavl.checkpoint.convert.verify import all_tensors
from megavl.checkpoint.folder import CheckpointError
from megavl.model.sizes import SIZES

_CONSOLE = Console(highlight=False, soft_wrap=True)
_MODULES = {
    "first_stage.towers.sam.": "SAM tower",
    "first_stage.towers.siglip.": "SigLIP tower",
    "first_stage.adaptor.": "adaptor",
    "first_stage.embedding.": "embedding",
    "decoder.": "decoder",
    "last_stage.": "head",
    "unused ": "unused",
    "optimizer ": "optimizer",
}
"""How names start (`all_tensors`) -> what they belong to."""


def main(arguments: Sequence[str]) -> int:
    """Show or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="a second checkpoint to compare with")
    options = parser.parse_args(arguments)
    try:
        form, contents = open_checkpoint(options.checkpoint)
        if options.other is None:
            _show(options.checkpoint, form, contents)
            return 0
        return _compare(contents, open_checkpoint(options.other)[1])
    except CheckpointError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1


def _show(path: Path, form: Format, contents: Contents) -> None:
    size = next((name for name, model in SIZES.items() if model == contents.model), "a size of its own")
    _CONSOLE.print(f"{path}: {form.name} ({form.describe(path)}), {size}, {_step(contents)}")
    table = Table("module", "tensors", "parameters", "bytes", "types")
    tensors = dict(all_tensors(contents))
    for prefix, module in _MODULES.items():
        part = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
        if part:
            table.add_row(module, *_sums(part))
    table.add_section()
    table.add_row("all", *_sums(list(tensors.values())))
    _CONSOLE.print(table)
    _CONSOLE.print(f"{contents.model}")
    if contents.files:
        _CONSOLE.print(f"files: {', '.join(contents.files)}")


def _step(contents: Contents) -> str:
    return f"step {contents.training.step}" if contents.training else "weights only"


def _sums(part: Sequence[LazyTensor]) -> tuple[str, str, str, str]:
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in part)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part})
    return f"{len(part)}", f"{parameters:,}", f"{sum(tensor.nbytes for tensor in part):,}", ", ".join(types)


def _compare(ours: Contents, theirs: Contents) -> int:
    """Name the first tensor that differs and count them; returns the exit status."""
    left, right = dict(all_tensors(ours)), dict(all_tensors(theirs))
    differences = {
        name: difference
        for name in [*left, *(name for name in right if name not in left)]
        if (difference := _difference(left.get(name), right.get(name)))
    }
    if not differences:
        _CONSOLE.print(f"{len(left)} tensors, all the same; {_step(ours)} and {_step(theirs)}")
        return 0
    name, difference = next(iter(differences.items()))
    _CONSOLE.print(f"{len(differences)} of {len(left | right)} tensors differ, first {name}: {difference}")
    return 1


def _difference(ours: LazyTensor | None, theirs: LazyTensor | None) -> str | None:
    """What differs between two tensors, in words; None: nothing. Values are compared as bits."""
    if ours is None or theirs is None:
        return f"only in the {'second' if ours is None else 'first'}"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{ours.dtype} {ours.shape} and {theirs.dtype} {theirs.shape}"
    count, largest = 0, 0.0
    for _, first, stop in pieces({"": ours}):
        left, right = ours.read(first, stop), theirs.read(first, stop)
        bits = left.view(torch.uint8) if left.dim() else left[None].view(torch.uint8)
        same = (bits == (right if right.dim() else right[None]).view(torch.uint8)).view(-1, left.dtype.itemsize).all(1)
        if not same.all():
            count += int((~same).sum())
            largest = max(largest, float((left.double() - right.double()).abs().max()))
    return f"{count:,} of {torch.Size(ours.shape).numel():,} values, by {largest:.3g} at most" if count else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
