"""Interpolation and the stride-2 convolution behind it, in plain PyTorch. Shapes: i images, c and k channels."""

from torch import Tensor

from megavl.kernels.interpolate.reference import interpolate_reference
from megavl.kernels.strided_conv.reference import strided_conv_reference


def interpolate_conv_reference(features: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """[i, c, y, x], [k, c, 3, 3] -> [i, k, ceil(size[0] / 2), ceil(size[1] / 2)]; rounded to the type in between."""
    return strided_conv_reference(interpolate_reference(features, size), weight)
