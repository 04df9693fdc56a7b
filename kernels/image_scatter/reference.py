"""Image features into the embedded tokens, in plain PyTorch.

Shapes: t rows of the stream, n image features, h hidden.
"""

import torch
from torch import Tensor


def image_scatter_reference(embedded: Tensor, features: Tensor, slots: Tensor, start: int = 0) -> Tensor:
    """Replace the rows of `embedded` that are image positions.

    Args:
        embedded: rows [start, start + t) of the stream, [t, h].
        features: [..., h], n rows in all.
        slots: distinct positions of the features in the whole stream, int64 [n].
        start: position of the first row of `embedded` in the stream.

    Returns:
        [t, h] in the type of `embedded`. Features whose position is elsewhere are left out.
    """
    rows, hidden = embedded.shape
    local = slots - start
    # One spare row takes all features of other slices, so that no size depends on the values of `slots`.
    place = torch.where((local >= 0) & (local < rows), local, rows)  # [n]
    spare = torch.cat([embedded, embedded.new_zeros(1, hidden)])  # [t + 1, h]
    return spare.index_copy(0, place, features.reshape(-1, hidden).to(embedded.dtype))[:rows]
