"""Memory and speed of a conversion beside `cp` of the same bytes on the same disk.

    tools/bench_conversion.py FOLDER --model 7b --to hf-transformers
    tools/bench_conversion.py FOLDER --model 7b --to megatron-ranks --tensor 2 --pipeline 2

In: a folder on the disk to measure, with room for two copies of the weights. Out: one line for `cp` and one for the
conversion, there and back: seconds, GB/s, share of `cp`, peak memory of the process (`ru_maxrss`; what the kernel
caches of files is not in it). Each is run by a process of its own and counts until the bytes are on the disk. The
weights are random bf16; everything that was written is removed. Options that this tool does not know go to
`convert_checkpoint.py`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.run import FORMATS
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.model.sizes import SIZES

_CONVERT = Path(__file__).with_name("convert_checkpoint.py")


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(SIZES), default="7b")
    parser.add_argument("--to", choices=FORMATS, default="hf-transformers")
    options, further = parser.parse_known_args()
    work = options.folder / "bench_conversion"
    work.mkdir(parents=True)
    try:
        _measure(work, options.model, options.to, further)
    finally:
        shutil.rmtree(work)
    return 0


def _measure(work: Path, model: str, to: str, further: list[str]) -> None:
    source, target = work / "source", work / "target"
    source.mkdir()
    DEEPSEEK.write(_random_contents(model), source, WriteOptions(), lambda count: None)
    os.sync()
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{model}, {size:,} bytes, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    copied, _ = _timed(["cp", "-r", str(source), str(work / "copy")])
    _report("cp", size, copied, copied, 0)
    shutil.rmtree(work / "copy")
    convert = [sys.executable, str(_CONVERT), "--no-verify"]
    there, memory = _timed([*convert, str(source), str(target), "--to", to, *further])
    _report(f"hf-deepseek -> {to}", size, there, copied, memory)
    shutil.rmtree(source)
    back, memory = _timed([*convert, str(target), str(source), "--to", "hf-deepseek"])
    _report(f"{to} -> hf-deepseek", size, back, copied, memory)


def _timed(command: list[str]) -> tuple[float, float]:
    """Seconds until the disk has it, start of the program included, and GiB of memory at most."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def _report(what: str, size: int, seconds: float, copied: float, memory: float) -> None:
    print(
        f"{what:38} {seconds:7.1f} s {size / seconds / 1e9:6.2f} GB/s {copied / seconds:6.0%} of cp {memory:6.2f} GiB",
        flush=True,
    )


def _random_contents(model: str) -> Contents:
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def random(name: str, shape: tuple[int, ...]) -> LazyTensor:
        row = torch.Size(shape[1:]).numel()

        def rows(first: int, stop: int) -> Tensor:
            start = first * row % block.numel()
            count = (stop - first) * row
            repeated = block.repeat(count // block.numel() + 2)[start : start + count]
            return repeated.view((stop - first, *shape[1:])) if shape else repeated[0]

        return LazyTensor(shape=shape, dtype=torch.bfloat16, rows=rows, source=name)

    tensors = {name: random(name, shape) for name, shape in full_shapes(SIZES[model]).items()}
    return Contents(model=SIZES[model], tensors=tensors)


if __name__ == "__main__":
    sys.exit(main())
