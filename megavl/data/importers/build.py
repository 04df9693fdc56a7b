"""Build a store from raw inputs with several processes, in input order whatever their number.

In: `BuildOptions`. Out: a store and its manifest, which names every input that was left out and why. Nothing is visible
at the output prefix before the last step, and an older store there stays until then.
"""

import ctypes
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megavl.data.importers.encode import DEFAULT_TEMPLATE, Encoded, Encoder, Kind
from megavl.data.importers.records import Item, find_files, read_records, read_texts
from megavl.data.importers.webdataset import read_tar
from megavl.data.prompt import template_fingerprint
from megavl.data.sample import Rejected
from megavl.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megavl.data.store_writer import StoreWriter

_SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".jsonl"),
    "conversations": (".json", ".jsonl"),
    "captions": (".json", ".jsonl"),
    "interleaved": (".json", ".jsonl"),
    "webdataset": (".tar", ".tgz", ".gz"),
}
_BATCH = 16  # items per message to a worker: a text record takes about 0.2 ms, a message about 0.1 ms
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to read and how to store it."""

    kind: tyro.conf.Positional[Kind]
    """text: documents for language pretraining, to .bin/.idx alone; conversations, captions, interleaved: JSON or JSON
    Lines; webdataset: tars."""
    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Files, or folders whose files are taken in order of name."""
    output: str
    """Prefix of the store: OUTPUT.bin, OUTPUT.idx, OUTPUT.manifest.json, ..."""
    tokenizer: Path
    """tokenizer.json or SentencePiece .model of the model to be trained."""
    template: Literal["default", "deepseek", "alignment", "plain"] = "default"
    """How samples are rendered. Default: deepseek for conversations, alignment for captions and webdataset, plain for
    interleaved documents. Single-round conversations can be rendered as captions (LLaVA's pretraining files)."""
    image_root: Path | None = None
    """Where relative image paths start; default: the folder of the file that names them."""
    split: Literal["files", "lines"] = "files"
    """Kind text: a text file is one document, or each of its lines is."""
    text_key: str = "text"
    """Kind text: field of a JSON record that holds the document."""
    max_length: int = 0
    """Reject samples longer than this many tokens, images at full length; 0: keep all."""
    tokens_per_image: int = 576
    """Positions that one image takes, for --max-length."""
    on_error: Literal["skip", "stop"] = "skip"
    """What a faulty input does: it is left out and listed, or it ends the build."""
    max_rejected: float = 0.01
    """Largest share of rejected inputs that still counts as success."""
    workers: int = multiprocessing.cpu_count()
    """Processes; 0 works in this one. The store does not depend on it."""
    overwrite: bool = False
    """Replace an existing store."""


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the store; returns its manifest.

    Raises:
        ValueError: an input is missing, a store is there already, nothing could be read, an input is faulty and
            `on_error` is `stop`, or more inputs were rejected than `max_rejected` allows (the store is written then).
    """
    from megavl.data.store_writer import StoreWriter  # imports megatron, 6 s that --help and the workers need not wait

    tokenizer = Tokenizer(options.tokenizer)
    template = DEFAULT_TEMPLATE[options.kind] if options.template == "default" else options.template
    if options.kind != "text":
        _ = tokenizer.image_id  # raises for a text-only tokenizer
    encoder = Encoder(
        kind=options.kind,
        tokenizer=tokenizer,
        template=template,
        text_key=options.text_key,
        max_length=options.max_length,
        tokens_per_image=options.tokens_per_image,
    )
    files = find_files(options.inputs, _SUFFIXES[options.kind])
    writer = StoreWriter(
        options.output,
        kind=options.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        template=template,
        template_fingerprint=template_fingerprint(template),
        overwrite=options.overwrite,
    )
    try:
        with writer:
            _fill(writer, options, encode_all(encoder, _read_all(options, files), options.workers))
            manifest = writer.finish()
    except OSError as error:  # reading errors are findings, so this one is about writing
        done = writer.counts["samples"]
        raise ValueError(
            f"{options.output}: {error.strerror or error} after {done} samples; nothing was stored"
        ) from error
    _check_rejected(options, manifest)
    return manifest


def _fill(writer: "StoreWriter", options: BuildOptions, results: Iterable[Encoded | Rejected]) -> None:
    progress = _Progress()
    for result in results:
        if isinstance(result, Encoded):
            writer.add(result.tokens, None if options.kind == "text" else result.learn, list(result.images))
        elif options.on_error == "stop":
            raise ValueError(f"{result.origin}: {result.reason}")
        else:
            writer.reject(result)
        progress.show(writer.counts)


def _check_rejected(options: BuildOptions, manifest: dict[str, Any]) -> None:
    rejected, stored = manifest["counts"]["rejected"], manifest["counts"]["samples"]
    share = rejected / (rejected + stored)
    if share > options.max_rejected:
        first = manifest["rejected"][0]
        raise ValueError(
            f"{rejected} of {rejected + stored} inputs ({share:.1%}) were rejected, --max-rejected allows "
            f"{options.max_rejected:.1%}; the first: {first['input']}: {first['reason']}. "
            f"The other {stored} are in {options.output}, all reasons in {options.output}.manifest.json"
        )


def _read_all(options: BuildOptions, files: list[Path]) -> Iterator[Item | Rejected]:
    for path in files:
        try:
            if options.kind == "webdataset":
                yield from read_tar(path)
            elif options.kind == "text":
                yield from read_texts(path, options.split)
            else:
                yield from read_records(path, options.image_root)
        except OSError as error:
            yield Rejected(str(path), f"can not be read ({error.strerror or error})")


def encode_all(encoder: Encoder, items: Iterable[Item | Rejected], workers: int) -> Iterator[Encoded | Rejected]:
    """Results in the order of the items; at most a few batches per worker are in memory."""
    if workers == 0:
        yield from map(encoder, items)
        return
    # Fork: the tokenizer and the imports are shared; nothing has started threads yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        waiting: deque[Future[list[Encoded | Rejected]]] = deque()
        batches = _batches(items)
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_batch, batch))
                if len(waiting) > 4 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError("a worker process died, most likely out of memory; try fewer --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(items: Iterable[Item | Rejected]) -> Iterator[list[Item | Rejected]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


_encoder: Encoder | None = None  # of this worker process


_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the main process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Workers hold both ends of the pipe that brings them work, so they would wait for a killed main process for ever.
    with suppress(OSError, AttributeError):  # another system than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    global _encoder
    _encoder = encoder


def _encode_batch(batch: list[Item | Rejected]) -> list[Encoded | Rejected]:
    assert _encoder is not None, "the worker was not started"
    return [_encoder(item) for item in batch]


class _Progress:
    """A line on the error stream every few seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def show(self, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        rate = counts["samples"] / (now - self._start)
        print(f"{describe(counts)}, {rate:,.0f} samples/s", file=sys.stderr, flush=True)


def describe(counts: dict[str, int]) -> str:
    """Totals in one line."""
    return (
        f"{counts['samples']:,} samples, {counts['tokens']:,} tokens ({counts['learnt_tokens']:,} learnt), "
        f"{counts['images']:,} images, {counts['rejected']:,} rejected"
    )
