"""The stride-2 convolution behind SAM in plain PyTorch. Shapes: i images, c channels, y and x rows and columns."""

from torch import Tensor
from torch.nn import functional


def strided_conv_reference(features: Tensor, weight: Tensor) -> Tensor:
    """3x3, stride 2, padding 1, no bias: [i, c, y, x] and [k, c, 3, 3] -> [i, k, ceil(y/2), ceil(x/2)]."""
    return functional.conv2d(features, weight, stride=2, padding=1)
