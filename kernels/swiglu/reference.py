"""SwiGLU in plain PyTorch: y = silu(gate) * up. Shapes: f hidden dimension of the feed-forward network."""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Gate and up projection side by side, [..., 2f] -> [..., f]; silu in fp32 at least, rounded before the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    inner = torch.promote_types(gate.dtype, torch.float32)
    return functional.silu(gate.to(inner)).to(gate.dtype) * up
