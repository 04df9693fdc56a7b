"""Head and loss of DeepSeek-VL on micro-batches of 1 and 8 rows. Shapes: h hidden size, v the whole vocabulary.

Only forward and backward together: the operator forms its gradients in the forward pass. Beside `triton`:

- `triton_buffer` adds the weight's gradient to an fp32 buffer that was there before, as training does; its peak memory
  therefore holds no gradient of `weight`, that of all others does.
- `triton_chunk512`, ...: other chunk sizes.
- `megatron`: a head in PyTorch before megatron-core's fused vocabulary-parallel loss, in a group of one rank.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megavl.kernels.benchmark import Call, Case
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.linear_cross_entropy.op import linear_cross_entropy
from megavl.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

HIDDEN = {"1.3b": 2048, "7b": 4096}
"""Model -> hidden size."""
TOKENS, VOCABULARY = 4096, 102400
IMAGE_TOKENS = 4 * 576
"""Positions without a label in a micro-batch with four images."""
CHUNKS = (512, 2048, 4096)
"""Chunk sizes tried beside the default, at micro-batch 1."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight [v, h], targets [t]) -> sum of the losses."""


def cases() -> list[Case]:
    """Every token has a label, and only those that are not image positions."""
    return [
        _case(model, rows, rows * learnt)
        for model in HIDDEN
        for rows in (1, 8)
        for learnt in (TOKENS, TOKENS - IMAGE_TOKENS)
    ]


def _case(model: str, micro_batch: int, learnt: int) -> Case:
    h, tokens = HIDDEN[model], micro_batch * TOKENS

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        hidden = torch.randn(tokens, h, device=device, dtype=dtype).requires_grad_()
        weight = (torch.randn(VOCABULARY, h, device=device) * h**-0.5).to(dtype).requires_grad_()
        targets = torch.randint(VOCABULARY, (tokens,), device=device)
        targets[learnt:] = -100
        rows = torch.arange(learnt, device=device) if learnt < tokens else None
        buffer = torch.zeros(VOCABULARY, h, device=device)

        def ours(**options: Any) -> Loss:
            return lambda x, w, y: linear_cross_entropy(x, w, y, rows=rows, **options)[0]

        chunks = CHUNKS if micro_batch == 1 else ()
        losses = {"triton": ours(), **{f"triton_chunk{n}": ours(chunk_rows=n) for n in chunks}, **_peers(device, dtype)}
        calls: dict[str, Call] = {
            name: lambda f=f: torch.autograd.grad(f(hidden, weight, targets), (hidden, weight))  # type: ignore[misc]
            for name, f in losses.items()
        }
        into_buffer = ours(weight_gradient=buffer)
        calls["triton_buffer"] = lambda: torch.autograd.grad(into_buffer(hidden, weight, targets), hidden)
        return calls

    return Case(
        op="linear_cross_entropy",
        name=f"{model} mb{micro_batch} tokens{tokens} learnt{learnt} h{h} v{VOCABULARY}",
        direction="forward+backward",
        make=make,
        flops=6.0 * learnt * h * VOCABULARY,  # head, gradient of hidden, gradient of weight
        bytes=4.0 * (tokens + VOCABULARY) * h,  # hidden and weight read, their gradients written
        check=check,
        share_ms=f"{model} {1 / micro_batch}" if learnt < tokens else "",  # a step leaves the image positions out
    )


def _peers(device: torch.device, dtype: torch.dtype) -> dict[str, Loss]:
    """What is installed, by name."""
    found: dict[str, Loss] = {"eager": _eager, "compile": torch.compile(_eager)}
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        found["liger"] = lambda x, w, y: liger(x, w, y, reduction="sum")
    except ImportError:
        pass
    if dtype is torch.bfloat16:  # the only type of its gradient
        try:
            fused = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
            found["megatron"] = _megatron(fused.fused_vocab_parallel_cross_entropy, device)
        except ImportError:
            pass
    return found


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def _megatron(fused: Callable[..., Tensor], device: torch.device) -> Loss:
    """Its loss has no target to ignore: the loss of such a token is replaced, as the model's reference does."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        counted = targets >= 0
        logits = (hidden @ weight.t()).unsqueeze(1)  # [t, 1, v]
        losses = fused(logits, targets.clamp(min=0).unsqueeze(1), group).squeeze(1)
        return torch.where(counted, losses, 0.0).sum()

    return loss


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Sum and both gradients at a small odd shape in several chunks, one target ignored.

    Not fewer than 4 rows a chunk: on one CPU thread BLAS sums products of 1 to 3 rows one by one, over 4211 columns at
    five times the error of 4 rows and more, and that difference to the reference would not be the kernel's.
    """
    hidden = torch.randn(9, 40, device=device, dtype=dtype)
    weight = (torch.randn(4211, 40, device=device) * 40**-0.5).to(dtype)
    targets = torch.tensor([0, 4210, 17, -100, 4096, 4095, 3, 1, 2], device=device)
    hold_to_reference(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk_rows=5)[0],
        lambda x, w: linear_cross_entropy_reference(x, w, targets)[0],
        [hidden, weight],
    )
