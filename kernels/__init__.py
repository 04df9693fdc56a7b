"""Fused operators of the vision-language path, in Triton. Imported as `megavl.kernels`; knows torch and triton only.

One folder an operator: `reference.py` (plain PyTorch, what is right), `kernel.py` (Triton), `op.py` (public function
and torch.library operator), `bench.py` (the real shapes). The model reaches them through `megavl/ops.py` alone.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # products fused with sums, also where triton's default is not
