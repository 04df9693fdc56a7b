"""What every operator needs around a launch: argument checks, and whether Triton interprets or compiles."""

import functools
import os

import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when a kernel is decorated."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that the kernels compute with; all of them accumulate in fp32."""


def check_tensor(
    name: str, tensor: Tensor, *, like: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Refuse a tensor that a kernel cannot take.

    Args:
        name: argument name for the message.
        tensor: the argument.
        like: another argument whose device it must share.
        dtypes: supported types.

    Raises:
        ValueError: wrong type or device, naming the argument and what is supported.
    """
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; supported are {names}")
    if INTERPRETING and tensor.dtype is torch.bfloat16:
        raise ValueError(
            f"{name} is bfloat16, which Triton's interpreter computes wrongly; use float32 or float16 there"
        )
    if tensor.device.type != "cuda" and not INTERPRETING:
        raise ValueError(
            f"{name} is on {tensor.device}; Triton kernels run on cuda (or anywhere under TRITON_INTERPRET=1)"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {like.device}")


def as_rows(x: Tensor) -> Tensor:
    """[..., h] as [rows, h] with adjacent values in a row; a copy only where strides make it necessary."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: two per multiprocessor on CUDA, a few in the interpreter."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
