"""A CUDA stream beside the one that trains; on the CPU, which has none, its work is done there and then.

In: a device. Out: blocks whose kernels do not wait for what was launched before them, and a way to hand over what was
made in them. The caching allocator has a pool per stream: memory that blocks have used serves later blocks only.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """One stream. Its priority is torch's default, the lowest there is."""

    def __init__(self, device: torch.device) -> None:
        """What the current stream has been given so far, such as loading weights, comes before all blocks."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def block(self) -> AbstractContextManager[Any]:
        """Kernels go to this stream inside; it waits neither for the current one nor the current one for it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """The current stream waits for all blocks so far and may then use `tensors`, which were made in them."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)  # freed at any time, it is not used again before `current` is done
