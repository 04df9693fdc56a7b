"""What the kernel tests compare with, and in which types. The comparison itself is the profiler's gate."""

import torch

from megavl.kernels.gate import hold_to_reference, relative_error

__all__ = ["DTYPES", "hold_to_reference", "relative_error"]

DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else []))
"""Triton's interpreter computes bf16 wrongly, so that type is tested on a GPU alone."""
