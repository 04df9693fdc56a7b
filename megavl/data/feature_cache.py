"""Features of frozen towers on disk, from one epoch to the next.

In: pixels, and a function that computes features of them. Out: the features, computed only for images that the folder
does not have. An entry is named by a hash of the pixels (what preprocessing made of the image) and of `fingerprint`
(what would compute them), so another image size, background, tower or type never meets it.

An entry is one file: a checksum of the rest, then the tensors as safetensors. It appears by renaming, complete or not
at all; an entry whose checksum is wrong is removed and computed anew. Any number of processes may share a folder: one
lock holds the bytes that they count in it, and whoever would exceed the limit first removes what was not used for
longest. The disk never stops a run: after an error the folder is left alone, with a warning.

Shapes: b images, S side of an image in pixels.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

Features = dict[str, Tensor]
"""Kind -> [b, ...]."""

_CHECKSUM_BYTES = 16
_LOCK = "lock"


class FeatureCache:
    """A folder of features; one object a process."""

    def __init__(self, folder: Path, limit_bytes: int, fingerprint: str) -> None:
        """Makes the folder.

        Args:
            folder: of this and other processes.
            limit_bytes: most that all entries take together.
            fingerprint: of everything but the pixels that features depend on.

        Raises:
            ValueError: the folder cannot be made.
        """
        self.folder, self.limit, self.fingerprint = folder, limit_bytes, fingerprint.encode()
        self.hits, self.misses = 0, 0
        self._broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"parallel.vision_cache {folder} cannot be made: {error}") from error

    def encode(self, pixels: Tensor, compute: Callable[[Tensor], Features], device: torch.device) -> Features:
        """Features of images, read where they are known.

        Args:
            pixels: uint8 [b, 3, S, S] in host memory, b at least 1.
            compute: pixels -> features, for those that are not known.
            device: where the features are wanted.

        Returns:
            [b, ...] by kind.
        """
        keys = [self._key(image) for image in pixels]
        known = {row: entry for row, key in enumerate(keys) if (entry := self._read(key)) is not None}
        missing = [row for row in range(len(keys)) if row not in known]
        self.hits, self.misses = self.hits + len(known), self.misses + len(missing)
        computed = compute(pixels[missing]) if missing else {}
        for place, row in enumerate(missing):
            known[row] = {kind: features[place] for kind, features in computed.items()}
            self._write(keys[row], known[row])
        rows = [known[row] for row in range(len(keys))]
        return {kind: torch.stack([row[kind].to(device) for row in rows]) for kind in rows[0]}

    def _key(self, image: Tensor) -> str:
        return hashlib.blake2b(image.contiguous().numpy().data, key=self.fingerprint[:64], digest_size=20).hexdigest()

    def _read(self, key: str) -> Features | None:
        """An entry, or None where there is none or it is damaged."""
        path = self.folder / key
        try:
            data = path.read_bytes()
            if _checksum(data[_CHECKSUM_BYTES:]) == data[:_CHECKSUM_BYTES]:
                os.utime(path)  # used now: the last to be removed
                return load(data[_CHECKSUM_BYTES:])
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # never there, or removed by another process meanwhile
            pass
        except OSError as error:
            self._give_up(error)
        return None

    def _write(self, key: str, features: Features) -> None:
        body = save({kind: tensor.detach().cpu().contiguous() for kind, tensor in features.items()})
        data = _checksum(body) + body
        if self._broken or len(data) > self.limit:
            return
        unfinished = self.folder / f"{key}.{os.getpid()}"
        try:
            self._reserve(len(data))
            unfinished.write_bytes(data)
            unfinished.replace(self.folder / key)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            self._give_up(error)

    def _reserve(self, size: int) -> None:
        """Count `size` bytes, after making room for them. The count may be above what is there, never below."""
        with (self.folder / _LOCK).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            lock.seek(0)
            counted = lock.read()  # nothing in a new folder, and where a process ended between the next two writes
            total = (int(counted) if counted.isdigit() else sum(held for _, held, _ in self._entries())) + size
            if total > self.limit:
                total = self._remove_oldest(self.limit - size) + size
            lock.truncate(0)
            lock.write(str(total))

    def _remove_oldest(self, room: int) -> int:
        """Remove entries until at most 90% of `room` bytes are taken, so that it is seldom done; returns those."""
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= 0.9 * room:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _entries(self) -> list[tuple[int, int, str]]:
        """(when it was used last, its bytes, its path) of each entry."""
        entries = []
        for entry in os.scandir(self.folder):
            if entry.name != _LOCK:
                try:
                    entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                except FileNotFoundError:
                    continue
        return entries

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            logging.getLogger(__name__).warning("parallel.vision_cache is not used any more: %s", error)
        self._broken = True


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
