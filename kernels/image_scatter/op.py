"""Image features into the embedded tokens as a differentiable operator.

Shapes: t rows of the stream on this rank, n image features, h hidden size.
"""

import torch
import triton
from torch import Tensor

from megavl.kernels.image_scatter.kernel import (
    BLOCK,
    INDEX_BLOCK,
    index_rows,
    scatter_backward_embedded,
    scatter_backward_features,
    scatter_forward,
)
from megavl.kernels.launch import as_rows, check_tensor


def image_scatter(embedded: Tensor, features: Tensor, slots: Tensor, start: int = 0) -> Tensor:
    """Replace the rows of `embedded` that are image positions; differentiable in `embedded` and `features`.

    Text embeddings are summed over the tensor group where the vocabulary is split: place features after that sum.
    Under sequence parallelism a rank holds rows [start, start + t) and passes all features with all positions. Those
    of other slices are left out, and their gradient is zero here: whoever owns the features sums their gradients over
    the tensor group. The gradient of `embedded` is zero in the replaced rows.

    Args:
        embedded: rows [start, start + t) of the stream, [t, h], fp32, fp16 or bf16; any strides.
        features: image features in the order of `slots`, [..., h], n rows in all; another type is converted.
        slots: distinct positions in the whole stream, int64 [n], on the device. Their values are not checked: the host
            would have to wait for the device.
        start: position in the stream of the first row of `embedded`.

    Returns:
        [t, h] in the type of `embedded`, contiguous.

    Raises:
        ValueError: unsupported type, device or shape, or features and slots differ in number.
    """
    check_tensor("embedded", embedded)
    check_tensor("features", features, like=embedded)
    check_tensor("slots", slots, like=embedded, dtypes=(torch.int64,))
    if embedded.dim() != 2:
        raise ValueError(f"embedded has {embedded.dim()} dimensions; supported is [rows, hidden]")
    if features.dim() < 1 or features.shape[-1] != embedded.shape[1]:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, the hidden size of embedded is {embedded.shape[1]}"
        )
    if slots.dim() != 1 or slots.shape[0] != features.shape[:-1].numel():
        raise ValueError(f"slots has shape {tuple(slots.shape)}, there are {features.shape[:-1].numel()} features")
    if start < 0:
        raise ValueError(f"start is {start}; supported are 0 and more")
    return _image_scatter(embedded, features, slots, start)[0]


@torch.library.custom_op("megavl::image_scatter", mutates_args=())
def _image_scatter(embedded: Tensor, features: Tensor, slots: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(y [t, h], index [t] int32)."""
    rows, images, slots = as_rows(embedded), as_rows(features), slots.contiguous()
    t, h = embedded.shape
    y = torch.empty(t, h, dtype=embedded.dtype, device=embedded.device)
    index = torch.full((t,), -1, dtype=torch.int32, device=embedded.device)
    if y.numel():
        if slots.numel():
            programs = triton.cdiv(slots.numel(), INDEX_BLOCK)
            index_rows[(programs,)](slots, index, start, t, slots.numel(), BLOCK=INDEX_BLOCK)
        grid = (t, triton.cdiv(h, BLOCK))
        scatter_forward[grid](rows, images, index, y, rows.stride(0), images.stride(0), h, BLOCK=BLOCK)
    return y, index


@_image_scatter.register_fake
def _(embedded: Tensor, features: Tensor, slots: Tensor, start: int) -> tuple[Tensor, Tensor]:
    return embedded.new_empty(embedded.shape), embedded.new_empty(embedded.shape[0], dtype=torch.int32)


@torch.library.custom_op("megavl::image_scatter_backward_embedded", mutates_args=())
def _backward_embedded(dy: Tensor, index: Tensor) -> Tensor:
    """Gradient of the text, [t, h]."""
    rows = as_rows(dy)
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    if dx.numel():
        t, h = dy.shape
        scatter_backward_embedded[(t, triton.cdiv(h, BLOCK))](rows, index, dx, rows.stride(0), h, BLOCK=BLOCK)
    return dx


@_backward_embedded.register_fake
def _(dy: Tensor, index: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


@torch.library.custom_op("megavl::image_scatter_backward_features", mutates_args=())
def _backward_features(dy: Tensor, slots: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the features, [n, h]."""
    rows, slots = as_rows(dy), slots.contiguous()
    t, h = dy.shape
    dx = torch.empty(slots.shape[0], h, dtype=dtype, device=dy.device)
    if dx.numel():
        grid = (slots.shape[0], triton.cdiv(h, BLOCK))
        scatter_backward_features[grid](rows, slots, dx, rows.stride(0), start, t, h, BLOCK=BLOCK)
    return dx


@_backward_features.register_fake
def _(dy: Tensor, slots: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(slots.shape[0], dy.shape[1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, features, slots, ctx.start = inputs
    ctx.features_shape, ctx.features_dtype = features.shape, features.dtype
    ctx.save_for_backward(slots, output[1])


def _backward(ctx, dy: Tensor, _dindex: Tensor):
    slots, index = ctx.saved_tensors
    dembedded = dfeatures = None
    if ctx.needs_input_grad[0]:
        dembedded = _backward_embedded(dy, index)
    if ctx.needs_input_grad[1]:
        dfeatures = _backward_features(dy, slots, ctx.start, ctx.features_dtype).view(ctx.features_shape)
    return dembedded, dfeatures, None, None


_image_scatter.register_autograd(_backward, setup_context=_setup_context)
