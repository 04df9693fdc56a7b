"""One conversion at a time into one target.

In: a target. Out: its lock, held or refused. The lock is a file `.TARGET.lock` beside the target; the system takes it
back from a process that ends in whatever way, so what a killed one leaves is a file that the next takes over.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megavl.checkpoint.folder import CheckpointError

log = logging.getLogger(__name__)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, whose parent exists; a file system without locks is told about and trusted.

    Raises:
        CheckpointError: another conversion holds it.
        OSError: the file system refused the file.
    """
    path = target.absolute().with_name(f".{target.name}.lock")
    lock = _take(path, target)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody else's
        lock.close()


def _take(path: Path, target: Path) -> IO[bytes]:
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise CheckpointError(f"{target}: another conversion is writing it") from None
        except OSError as error:
            log.warning("%s: a second conversion into it would not be noticed (%s)", target, error.strerror)
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # its holder removed the file between our opening and our locking it
