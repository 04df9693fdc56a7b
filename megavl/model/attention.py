"""Causal attention within documents: the core attention of every decoder layer.

In: query, key, value of one micro-batch whose rows are joined end to end, and where its documents start. Out: the
attended values; no position sees another document or a later position. Positions come with each token, so rotary angles
do not depend on where a document lies in the stream.

Three ways to compute it, the first that applies is used (`attention_backend`): `flash_attn`, torch's variable-length
attention, and an exact path of plain torch calls that runs everywhere.

Shapes: t tokens of the micro-batch, n query heads and g key/value heads of this tensor rank, d head size, c documents.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional

from megavl.data.microbatch import MicroBatch
from megavl.ops import Operator

Backend = Literal["flash_attn", "torch_varlen", "exact"]


@dataclass
class Documents(PackedSeqParams):
    """A packed micro-batch as megatron-core describes it, and what attention needs, computed once for all layers."""

    cos: Tensor | None = None
    """Cosine of the rotary angles, fp32 [t, 1, d/2]."""
    sin: Tensor | None = None
    """Sine of the rotary angles, fp32 [t, 1, d/2]."""
    backend: Backend = "exact"
    """How attention is computed."""
    groups: tuple[tuple[int, int], ...] = ()
    """(documents, tokens of each) per distinct length, shortest first. Exact path only."""
    order: Tensor | None = None
    """Token index that brings documents of one length together, int64 [t]; None where they are. Exact path only."""
    restore: Tensor | None = None
    """Inverse of `order`."""


def describe_documents(batch: MicroBatch, head_dim: int, rope_theta: float, dtype: torch.dtype) -> Documents:
    """What every layer needs to know of `batch`.

    The exact path reads the lengths of the documents on the host, which waits for the device once per micro-batch; the
    other two never do.

    Args:
        batch: the micro-batch, on the device of the model.
        head_dim: d.
        rope_theta: base of the rotary frequencies.
        dtype: type of query, key and value.
    """
    backend = attention_backend(batch.tokens.device, dtype)
    cos, sin = rotary_table(batch.positions, head_dim, rope_theta)
    documents = Documents(
        qkv_format="thd",  # tokens, heads, head size
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_document,
        max_seqlen_kv=batch.max_document,
        cos=cos,
        sin=sin,
        backend=backend,
    )
    if backend == "exact":
        documents.groups, documents.order, documents.restore = _group_by_length(batch.cu_seqlens)
    return documents


def rotary_table(positions: Tensor, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, fp32 [t, 1, d/2] each, from positions [t]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # [d/2]
    angles = positions.float().unsqueeze(-1) / rope_theta**exponents  # [t, d/2]
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + d/2) of each head by the angles of its position, as LLaMA does.

    Args:
        heads: [t, n, d].
        cos: [t, 1, d/2]; fp32 or wider, in which the products are computed.
        sin: the same.
    """
    first, second = heads.chunk(2, dim=-1)  # [t, n, d/2] each
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)


class DocumentAttention(torch.nn.Module):
    """megatron-core's slot for core attention: rotates query and key, then attends within documents."""

    def __init__(self, rope: Operator | None = None, **_: Any) -> None:
        """Takes what megatron-core hands to a core attention; no parameters come of it.

        Args:
            rope: `Ops.rope`.
        """
        super().__init__()
        self.rotate = rotate if rope is None else rope

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [t, n, d].
            key: [t, g, d].
            value: [t, g, d].
            attention_mask: not used; documents and causality say everything.
            kwargs: `packed_seq_params` is the micro-batch's `Documents`.

        Returns:
            [t, n*d].
        """
        documents: Documents = kwargs["packed_seq_params"]
        assert documents.cos is not None
        assert documents.sin is not None
        query = self.rotate(query, documents.cos, documents.sin)
        key = self.rotate(key, documents.cos, documents.sin)
        return attend(query, key, value, documents).flatten(1)  # [t, n*d]


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents, [t, n, d] from query [t, n, d] and key, value [t, g, d]."""
    if documents.backend == "exact":
        return _attend_exactly(query, key, value, documents)
    kernel = _flash_attn() if documents.backend == "flash_attn" else _torch_varlen()
    starts, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    return kernel(query, key, value.contiguous(), starts, starts, longest, longest)


@functools.cache
def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Which way attention is computed; start-up prints it.

    The two kernels exist for CUDA and 16-bit types only.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "exact"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    return "torch_varlen" if importlib.util.find_spec("torch.nn.attention.varlen") is not None else "exact"


@functools.cache
def _flash_attn() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, causal=True)


@functools.cache
def _torch_varlen() -> Callable[..., Tensor]:
    """torch's kernel; how causality is asked for, and whether grouped queries are, changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    compute: Callable[..., Any] = varlen_attn

    def kernel(query: Tensor, key: Tensor, value: Tensor, *layout: Any) -> Tensor:
        if key.shape[1] == query.shape[1]:
            return compute(query, key, value, *layout, **causal)
        if "enable_gqa" in known:
            return compute(query, key, value, *layout, enable_gqa=True, **causal)
        return compute(query, *_repeat_heads(query, key, value), *layout, **causal)

    return kernel


def _attend_exactly(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """One dense causal attention per distinct document length."""
    key, value = _repeat_heads(query, key, value)
    if documents.order is not None:
        query, key, value = (x.index_select(0, documents.order) for x in (query, key, value))
    attended, start = [], 0
    for count, length in documents.groups:
        stop = start + count * length
        q, k, v = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        group = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [c, n, tokens, d]
        attended.append(group.transpose(1, 2).flatten(0, 1))  # [c*tokens, n, d]
        start = stop
    joined = torch.cat(attended) if len(attended) > 1 else attended[0]  # [t, n, d]
    return joined if documents.restore is None else joined.index_select(0, documents.restore)


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with a head for each query head; the query heads of a group are neighbours."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _group_by_length(cu_seqlens: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor | None, Tensor | None]:
    """(documents, tokens) per distinct length, and the order of tokens that puts equal lengths side by side."""
    starts = cu_seqlens.tolist()
    spans = [(stop - start, start) for start, stop in itertools.pairwise(starts)]
    lengths = [length for length, _ in spans]
    groups = tuple((lengths.count(length), length) for length in sorted(set(lengths)))
    if lengths == sorted(lengths):
        return groups, None, None
    order = torch.cat([torch.arange(start, start + length) for length, start in sorted(spans)])
    device = cu_seqlens.device
    return groups, order.to(device), order.argsort().to(device)
