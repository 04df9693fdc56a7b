"""Write a store (see `megavl/data/store.py`), complete or not at all.

In: samples as token ids, learn flags and encoded images, in order. Out: the files at a prefix P. They grow in the
folder `P.partial`, which one process at a time has locked, and are moved to their names at the end, `.idx` last:
without it nothing reads as a store. A build that fails leaves an older store at the same prefix as it was.
"""

import contextlib
import fcntl
import json
import os
import shutil
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from megavl.data.sample import Rejected

LEARN, IMAGES, IMAGE_OFFSETS, IMAGE_COUNTS = ".learn.bin", ".images.bin", ".images.idx.npy", ".image_counts.npy"
MANIFEST = ".manifest.json"
FORMAT = "megavl store 1"
_LOCK = "lock"
MAX_LISTED = 10_000
"""Rejected inputs that the manifest names; all are counted."""


class StoreWriter:
    """Collects samples; `finish` makes the store readable, `abort` removes what was written."""

    def __init__(
        self,
        prefix: str | Path,
        *,
        kind: str,
        tokenizer_fingerprint: str,
        template: str = "",
        template_fingerprint: str = "",
        overwrite: bool = False,
    ) -> None:
        """Start a store.

        Args:
            prefix: path without suffix; folders are made.
            kind: `text` (all tokens learnt, no images) or what `tools/build_data.py` was asked for.
            tokenizer_fingerprint: of the tokenizer that made the ids.
            template: name of the template, for the reader of the manifest.
            template_fingerprint: from `prompt.template_fingerprint`.
            overwrite: replace an existing store when finishing.

        Raises:
            ValueError: there is a store at `prefix` and `overwrite` is off, or another process is building it.
        """
        self.prefix = str(prefix)
        if Path(self.prefix + ".idx").exists() and not overwrite:
            raise ValueError(f"{self.prefix}: there is a store already; remove it, or ask to overwrite it")
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "template": template,
            "template_fingerprint": template_fingerprint,
        }
        self._folder = Path(self.prefix + ".partial")
        self._take_folder()
        self._multimodal = kind != "text"
        self._builder = IndexedDatasetBuilder(str(self._folder / ".bin"), dtype=np.int32)
        # 12 bytes a sample; the lists of Python numbers that they replace take 72.
        self._builder.sequence_lengths, self._builder.document_indices = array("i"), array("q", [0])
        self._learn: BinaryIO | None = (self._folder / LEARN).open("wb") if self._multimodal else None
        self._images: BinaryIO | None = (self._folder / IMAGES).open("wb") if self._multimodal else None
        self._image_offsets, self._image_counts = array("q", [0]), array("i")
        self._rejected: list[Rejected] = []
        self.counts = {"samples": 0, "tokens": 0, "learnt_tokens": 0, "images": 0, "largest_id": -1, "rejected": 0}
        """Totals so far."""

    def _take_folder(self) -> None:
        """Lock the folder for this process and clear it of what a killed build left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / _LOCK).open("w")
        try:
            fcntl.lockf(
                self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of this process alone: forked workers do not hold it
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"{self.prefix}: another process is building this store in {self._folder}") from None
        for left in self._folder.iterdir():
            if left.name != _LOCK:
                left.unlink()

    def add(
        self, tokens: NDArray[np.integer], learn: NDArray[np.bool_] | None = None, images: list[bytes] | None = None
    ) -> None:
        """Append a sample.

        Args:
            tokens: ids with begin and end mark, one placeholder per image, [n], n >= 1.
            learn: targets, [n]; None: all.
            images: encoded images in reading order.
        """
        assert len(tokens) > 0, "an empty sample"
        flags = np.ones(len(tokens), dtype=np.uint8) if learn is None else learn.astype(np.uint8)
        assert len(flags) == len(tokens), f"{len(flags)} flags for {len(tokens)} tokens"
        self._builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
        if self._learn is not None and self._images is not None:
            self._learn.write(flags.tobytes())
            for image in images or ():
                assert image, "an empty image"
                self._images.write(image)
                self._image_offsets.append(self._image_offsets[-1] + len(image))
            self._image_counts.append(len(images or ()))
        else:
            assert not images, "a text store has no images"
            assert flags.all(), "all tokens of a text store are learnt"
        self.counts["samples"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["learnt_tokens"] += int(flags.sum())
        self.counts["images"] += len(images or ())
        self.counts["largest_id"] = max(self.counts["largest_id"], int(tokens.max()))

    def reject(self, rejected: Rejected) -> None:
        """Note an input that is left out."""
        self.counts["rejected"] += 1
        if len(self._rejected) < MAX_LISTED:
            self._rejected.append(rejected)

    def finish(self) -> dict[str, Any]:
        """Make the store readable; returns its manifest.

        Raises:
            ValueError: no sample was added.
        """
        if not self.counts["samples"]:
            first = (
                f"; the first of them: {self._rejected[0].origin}: {self._rejected[0].reason}" if self._rejected else ""
            )
            self.abort()
            raise ValueError(
                f"{self.prefix}: no sample to store, {self.counts['rejected']} inputs were rejected{first}"
            )
        self._builder.finalize(str(self._folder / ".idx"))
        if self._learn is not None and self._images is not None:
            self._learn.close()
            self._images.close()
            np.save(self._folder / IMAGE_OFFSETS, np.array(self._image_offsets, dtype=np.int64))
            np.save(self._folder / IMAGE_COUNTS, np.array(self._image_counts, dtype=np.int32))
        sizes = {path.name: path.stat().st_size for path in sorted(self._folder.iterdir()) if path.name != _LOCK}
        rejected = [{"input": r.origin, "reason": r.reason} for r in self._rejected]
        manifest = {**self._manifest, "counts": self.counts, "file_sizes": sizes, "rejected": rejected}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self._folder / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")
        self._publish()
        return manifest

    def _publish(self) -> None:
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for suffix in (".idx", ".bin", LEARN, IMAGES, IMAGE_OFFSETS, IMAGE_COUNTS, MANIFEST):
            Path(self.prefix + suffix).unlink(missing_ok=True)  # of an older store, `.idx` first
        for suffix in (".bin", LEARN, IMAGES, IMAGE_OFFSETS, IMAGE_COUNTS, MANIFEST, ".idx"):
            if (self._folder / suffix).exists():
                os.replace(self._folder / suffix, self.prefix + suffix)
        shutil.rmtree(self._folder)
        self._lock.close()

    def abort(self) -> None:
        """Remove what was written; an older store at the prefix stays as it is."""
        for file in (self._builder.data_file, self._learn, self._images):
            if file is not None:
                with contextlib.suppress(OSError):  # on a full disk, closing fails to flush
                    file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()
