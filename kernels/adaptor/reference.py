"""The vision-language adaptor in plain PyTorch. Shapes: c_high and c_low widths of the towers, h hidden size."""

import torch
from torch import Tensor
from torch.nn import functional


def adaptor_reference(
    high: Tensor | None,
    low: Tensor,
    high_weight: Tensor | None,
    high_bias: Tensor | None,
    low_weight: Tensor,
    low_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Own first layer per tower, joined along features (high first), exact GELU, second layer.

    Args:
        high: features of the high-resolution tower, [..., c_high]; None (and no parameters) for one tower.
        low: features of the low-resolution tower, [..., c_low].
        high_weight: [h/2, c_high].
        high_bias: [h/2].
        low_weight: [h/2, c_low]; [h, c_low] for one tower.
        low_bias: as long as `low_weight`.
        weight: [h, h].
        bias: [h].

    Returns:
        [..., h].
    """
    joined = functional.linear(low, low_weight, low_bias)
    if high is not None:
        assert high_weight is not None, "a tower without its layer"
        joined = torch.cat([functional.linear(high, high_weight, high_bias), joined], dim=-1)
    return functional.linear(functional.gelu(joined), weight, bias)
