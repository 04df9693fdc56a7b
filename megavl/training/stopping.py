"""How a run ends other than by finishing: asked to by a signal, or because a rank failed.

In: signals, exceptions. Out: a flag that the loop agrees on over all ranks, and an exit code other than 0 on every
rank, with one sentence for the user and no rank left waiting.
"""

import os
import signal
import sys
import time
import traceback
from types import FrameType

FAREWELL_S = 5.0
"""How long a failed rank other than 0 waits for the launcher to end it before it tells its own story."""


class RunStoppedError(RuntimeError):
    """The run cannot go on; the message is one sentence for the user."""


class StopRequest:
    """Remembers SIGTERM and SIGINT instead of dying of them; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: str = ""
        """Name of the signal that came, or empty."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            os._exit(130)  # the user insists
        self.signal = signal.Signals(number).name


def fail(error: BaseException, stop: StopRequest) -> int:
    """Tell why the run fails and return the exit code.

    Torchrun ends the other ranks as soon as one has ended, and most of them fail only because that one left them. So
    ranks other than 0 wait a moment: where the launcher ends them, another rank has told the user already.

    Args:
        error: what was raised. A `ValueError`, `OSError` or `RunStoppedError` is the user's to mend and told in its
            own words, anything else with its traceback.
        stop: the run's.
    """
    rank = int(os.environ.get("RANK", "0"))
    deadline = time.monotonic() + (0 if rank == 0 else FAREWELL_S)
    while time.monotonic() < deadline and not stop.signal:
        time.sleep(0.05)
    if rank == 0 or not stop.signal:
        told = isinstance(error, (ValueError, OSError, RunStoppedError))
        if not told:
            traceback.print_exception(error)
        kind = "" if told else f"{type(error).__name__}: "
        where = f" (rank {rank})" if rank else ""
        print(f"megavl: {kind}{error}{where}", file=sys.stderr, flush=True)
    return 1
