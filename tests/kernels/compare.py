"""What the kernel tests compare with, and in which types. The comparison itself is the profiler's gate."""

import pytest
import torch

from megavl.kernels.gate import hold_to_reference, relative_error

__all__ = ["DTYPES", "hold_to_reference", "relative_error"]

_ON_A_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter gets bf16 wrong"),
)
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=_ON_A_GPU))
"""`-m gpu` chooses the type that is trained in, which needs a GPU."""
