"""Core attention against dense attention under a block-diagonal causal mask, forward and backward; rotary positions."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megavl.model import attention
from megavl.model.attention import DocumentAttention, Documents, attend, attention_backend, rotary_table, rotate

PACKS = {
    "one document": [12],
    "equal lengths": [5, 5, 5],
    "sorted lengths": [1, 2, 2, 7],
    "mixed lengths": [7, 2, 1, 9, 2, 7],
}
HEADS = [(4, 4), (4, 2), (3, 1)]
"""Query and key heads."""


def describe(lengths: list[int], head_dim: int, restart: bool = True) -> Documents:
    """The `Documents` of a pack, through the public function."""
    total = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]) if restart else torch.arange(total)
    batch = SimpleNamespace(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=positions,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max_document=max(lengths),
    )
    return attention.describe_documents(batch, head_dim, 10000.0, torch.float32)


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """One softmax over the whole stream, masked: same document and not later."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document[None]) & torch.ones(len(query), len(query), dtype=torch.bool).tril()
    share = query.shape[1] // key.shape[1]
    key, value = (torch.stack([x[:, head // share] for head in range(query.shape[1])], 1) for x in (key, value))
    scores = torch.einsum("tnd,und->ntu", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("ntu,und->tnd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)


def random_heads(total: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(total)
    shapes = [(total, n, 6) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_exact_path_equals_dense(pack: str, heads: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    lengths = PACKS[pack]
    tensors = random_heads(sum(lengths), heads, dtype)
    ours = attend(*tensors, describe(lengths, 6))
    plain = dense(*tensors, lengths)
    weight = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, weight), torch.autograd.grad(plain, tensors, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_packed_equals_each_document_alone() -> None:
    lengths, core = [4, 3, 6], DocumentAttention()
    query, key, value = random_heads(13, (4, 2), torch.float32)
    packed = core(query, key, value, None, packed_seq_params=describe(lengths, 6))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = core(query[part], key[part], value[part], None, packed_seq_params=describe([length], 6))
        torch.testing.assert_close(packed[part], alone)
        start += length


def test_positions_come_with_the_tokens() -> None:
    """Positions that run on, or start elsewhere, give the same result: rotation is relative within a document."""
    query, key, value = random_heads(13, (2, 2), torch.float32)
    core, lengths = DocumentAttention(), [4, 9]
    restart = core(query, key, value, None, packed_seq_params=describe(lengths, 6))
    running = core(query, key, value, None, packed_seq_params=describe(lengths, 6, restart=False))
    torch.testing.assert_close(restart, running, rtol=1e-5, atol=1e-5)
    still = describe(lengths, 6)
    still.cos, still.sin = torch.ones_like(still.cos), torch.zeros_like(still.sin)
    assert not torch.allclose(restart, core(query, key, value, None, packed_seq_params=still))


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    cos, sin = rotary_table(torch.tensor([0, 1, 500]), 4, 100.0)  # frequencies 1 and 1/10
    unit = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(3, 1, 4)  # each pair (j, j + 2) points along its first axis
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [500.0, 50.0]])
    torch.testing.assert_close(rotate(unit, cos, sin)[:, 0], torch.cat((angles.cos(), angles.sin()), -1))
    assert rotate(unit.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_kernels_are_for_cuda_and_16_bits_only() -> None:
    assert attention_backend(torch.device("cpu"), torch.bfloat16) == "exact"
    assert attention_backend(torch.device("cuda"), torch.float32) == "exact"
    assert attention_backend(torch.device("cuda"), torch.bfloat16) in ("flash_attn", "torch_varlen")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_kernel_near_exact_on_cuda(heads: tuple[int, int]) -> None:
    """The bf16 kernel is as near to fp32 as the exact path in bf16 is, within a factor of 2."""
    lengths = PACKS["mixed lengths"]
    wide = [torch.randn(sum(lengths), n, 64, device="cuda") for n in (heads[0], heads[1], heads[1])]
    documents = describe(lengths, 64)
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "order", "restore"):
        setattr(documents, name, getattr(documents, name).cuda())
    narrow = [x.bfloat16() for x in wide]
    expected = attend(*wide, documents)
    exact = (attend(*narrow, documents).float() - expected).abs().max()
    documents.backend = attention_backend(torch.device("cuda"), torch.bfloat16)
    kernel = (attend(*narrow, documents).float() - expected).abs().max()
    assert kernel <= 2 * exact
