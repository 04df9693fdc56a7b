r"""Convert a checkpoint between every format and layout, tensor by tensor.

    tools/convert_checkpoint.py deepseek-vl-7b-base/ start/ --to megatron-dist
    tools/convert_checkpoint.py runs/stage3 export/ --to hf-transformers --dtype bfloat16 --tokenizer tokenizer.json
    tools/convert_checkpoint.py start/ ranks/ --to megatron-ranks --tensor 2 --pipeline 4 --layout 8,8,8,6 --dry-run

The source's format, size and layout are detected. Formats: `hf-deepseek` (the released repositories),
`hf-transformers` (`from_pretrained`), `megatron-dist` (what training saves, any layout), `megatron-ranks`
(Megatron-LM's folder of rank files). The target is written beside and appears when it is complete and verified.

Exit status: 0 if the target is there, 1 otherwise, with one sentence on what is wrong.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from megavl.checkpoint.convert.formats import Progress, Slice, WriteOptions
from megavl.checkpoint.convert.run import FORMATS, Plan, Request, convert, plan
from megavl.checkpoint.folder import CheckpointError
from megavl.config import ParallelConfig

_CONSOLE = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Convert, or show how; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    request = _request(options)
    try:
        _refuse_what_is_not_used(parser, options)
        if options.dry_run:
            _show(plan(request), options.show)
            return 0
        start = time.monotonic()
        record = convert(request, progress_bar)
    except CheckpointError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted, nothing was made", file=sys.stderr)
        return 130
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _CONSOLE.print(
        f"{request.target}: {record['tensors']} tensors and {record['unused']} unused ones, {record['bytes']:,} bytes, "
        f"{'verified' if record['verified'] else 'not verified'}, {time.monotonic() - start:.1f} s, "
        f"at most {memory:.2f} GiB of memory"
    )
    for name, count in (record["verified"] or {}).get("nan", {}).items():
        _CONSOLE.print(f"{name} holds {count} NaN, as in the source")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that does not exist")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size of rank files")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size of rank files")
    parser.add_argument("--virtual-pipeline", type=int, default=1, help="chunks per pipeline rank of rank files")
    parser.add_argument("--layout", default="", help="decoder layers per stage of rank files, such as 8,8,8,6")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="cast the weights")
    parser.add_argument("--names", choices=["4.56", "5"], default="5", help="version of transformers")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, a .model, or a folder with either")
    parser.add_argument("--drop-unused", action="store_true", help="leave out tensors that no forward pass reads")
    parser.add_argument("--no-verify", action="store_true", help="do not read the target back")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="first and last N tensors of a plan")
    return parser


_OF_ONE_FORMAT = {
    "megatron-ranks": ("tensor", "pipeline", "virtual_pipeline", "layout"),
    "hf-transformers": ("names",),
}
"""Format -> options that no other has."""


def _refuse_what_is_not_used(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options about the target that its format does not have.

    Raises:
        CheckpointError: there is one.
    """
    for form, names in _OF_ONE_FORMAT.items():
        for name in names:
            value = getattr(options, name)
            if form != options.to and value != parser.get_default(name):
                raise CheckpointError(f"--{name.replace('_', '-')} {value} is for --to {form}, not --to {options.to}")


def _request(options: argparse.Namespace) -> Request:
    parallel = ParallelConfig(
        tensor=options.tensor,
        pipeline=options.pipeline,
        virtual_pipeline=options.virtual_pipeline,
        layout=options.layout,
    )
    return Request(
        source=options.source,
        target=options.target,
        to=options.to,
        options=WriteOptions(parallel=parallel, names=options.names, drop_unused=options.drop_unused),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        tokenizer=options.tokenizer,
        verify=not options.no_verify,
    )


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Progress]:
    """A progress bar with bytes and bytes per second; where there is no terminal, only its last state is printed."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, TimeRemainingColumn(), console=_CONSOLE) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _show(planned: Plan, count: int) -> None:
    """The plan: first and last tensors, and the sum."""
    training = planned.contents.training
    _CONSOLE.print(
        f"{planned.source['format']} -> {planned.target.name}, {planned.nbytes:,} bytes in {_files(planned)}"
    )
    if training:
        _CONSOLE.print(f"training state of step {training.step}")
    slices = planned.slices
    for part in slices[:count]:
        _CONSOLE.print(_line(part))
    if len(slices) > 2 * count:
        _CONSOLE.print(f"  ... {len(slices) - 2 * count} more ...")
    for part in slices[max(count, len(slices) - count) :]:
        _CONSOLE.print(_line(part))


def _files(planned: Plan) -> str:
    files = {part.file for part in planned.slices}
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _line(part: Slice) -> str:
    size = torch.Size(part.shape).numel() * part.dtype.itemsize
    where = f"{part.file}{f' ({part.part})' if part.part else ''}"
    return f"  {part.name}  {list(part.shape)} {str(part.dtype).removeprefix('torch.')} {size:,} bytes -> {where}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
