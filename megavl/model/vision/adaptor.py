"""The vision-language adaptor: tower features to the decoder's hidden size, one vector per slot.

In: high-resolution features (None for models with SigLIP alone) and low-resolution features. Out: what fills the image
slots of the embedded sequence. `hybrid` is the released 7B's, `mlp_gelu` the released 1.3B's; the others are the rows
of the report's Table 10, whose text names but does not define them: see each class for our reading.

Shapes: i images, p slots per image (g*g, rows first), c_high and c_low widths of the towers, h hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavl.config import ModelConfig
from megavl.ops import PLAIN, Operator, Ops


def make_adaptor(model: ModelConfig, ops: Ops = PLAIN) -> nn.Module:
    """Build the adaptor of a model.

    Args:
        model: sizes and `adaptor`, the kind.
        ops: fused operators; there are two, for `hybrid` and `mlp_gelu`.

    Returns:
        A module called with (high features [i, p, c_high] or None, low features [i, p, c_low]), giving [i, p, h].

    Raises:
        ValueError: the kind does not fit the towers or the sizes.
    """
    kind, hidden, low = model.adaptor, model.decoder.hidden, model.siglip.width
    if kind == "mlp_gelu":
        if model.sam is not None:
            raise ValueError("model.adaptor is mlp_gelu, for 1 tower, but the model has 2 (siglip and sam)")
        return MlpAdaptor(low, hidden, ops.mlp_adaptor)
    if model.sam is None:
        raise ValueError(f"model.adaptor is {kind}, for 2 towers, but the model has 1 (sam is None)")
    high, grid = model.sam.downsample[-1], model.siglip.grid
    if model.sam.upsample != 4 * grid:
        raise ValueError(f"model.sam.upsample is {model.sam.upsample}, 4 times the SigLIP grid is {4 * grid}")
    if kind in ("hybrid", "separate") and hidden % 2:
        raise ValueError(f"model.adaptor {kind} gives each of 2 towers half of decoder.hidden, which is {hidden}")
    if kind == "hybrid":
        return HybridAdaptor(high, low, hidden, ops.hybrid_adaptor)
    if kind == "shared":
        return SharedAdaptor(high, low, hidden)
    if kind == "separate":
        return SeparateAdaptor(high, low, hidden)
    return PoolAdaptor(high, low, hidden, grid, along="width" if kind == "pool_w" else "height")


class MlpAdaptor(nn.Module):
    """Two linear layers on the one tower's features (released 1.3B, `mlp_gelu`)."""

    def __init__(self, low: int, hidden: int, fused: Operator | None = None) -> None:
        super().__init__()
        self.fused = fused
        self.layers = nn.Sequential(Layer(low, hidden), nn.GELU(), Layer(hidden, hidden))

    def forward(self, high_features: Tensor | None, low_features: Tensor) -> Tensor:
        """(None, [i, p, c_low]) -> [i, p, h]."""
        assert high_features is None, "a model with two towers needs another adaptor"
        if self.fused is not None:
            return self.fused(low_features, *self.layers[0](), *self.layers[2]())
        return self.layers(low_features)


class HybridAdaptor(nn.Module):
    """Own first layer per tower, joined along features (high first), shared second layer (released 7B)."""

    def __init__(self, high: int, low: int, hidden: int, fused: Operator | None = None) -> None:
        super().__init__()
        self.fused = fused
        self.high_up_proj = Layer(high, hidden // 2)
        self.low_up_proj = Layer(low, hidden // 2)
        self.layers = nn.Sequential(nn.GELU(), Layer(hidden, hidden))

    def forward(self, high_features: Tensor, low_features: Tensor) -> Tensor:
        """([i, p, c_high], [i, p, c_low]) -> [i, p, h]."""
        if self.fused is not None:
            parameters = (*self.high_up_proj(), *self.low_up_proj(), *self.layers[1]())
            return self.fused(high_features, low_features, *parameters)
        joined = torch.cat([self.high_up_proj(high_features), self.low_up_proj(low_features)], dim=-1)
        return self.layers(joined)


class Layer(nn.Linear):
    """A linear layer that, called without an input, hands out its parameters.

    Fused operators get them so: under overlapped parameter gathering a hook on the call waits until they have arrived.
    """

    def forward(self, features: Tensor | None = None) -> Any:
        """[..., c] -> [..., h], or nothing -> (weight, bias)."""
        return (self.weight, self.bias) if features is None else super().forward(features)


class SharedAdaptor(nn.Module):
    """Table 10, embedding concatenation with a shared MLP: join along features first, then both layers on the whole."""

    def __init__(self, high: int, low: int, hidden: int) -> None:
        super().__init__()
        self.layers = _mlp(high + low, hidden)

    def forward(self, high_features: Tensor, low_features: Tensor) -> Tensor:
        """([i, p, c_high], [i, p, c_low]) -> [i, p, h]."""
        return self.layers(torch.cat([high_features, low_features], dim=-1))


class SeparateAdaptor(nn.Module):
    """Table 10, embedding concatenation with separate MLPs: both layers per tower to half the size, then join."""

    def __init__(self, high: int, low: int, hidden: int) -> None:
        super().__init__()
        self.high_layers = _mlp(high, hidden // 2)
        self.low_layers = _mlp(low, hidden // 2)

    def forward(self, high_features: Tensor, low_features: Tensor) -> Tensor:
        """([i, p, c_high], [i, p, c_low]) -> [i, p, h]."""
        return torch.cat([self.high_layers(high_features), self.low_layers(low_features)], dim=-1)


class PoolAdaptor(nn.Module):
    """Table 10, sequence concatenation with token pooling and the hybrid MLP.

    Two neighbours of the grid, along its width or height, are stacked into one vector, which halves each tower's
    sequence; own first layer per tower, the two halves one after the other (high first), shared second layer.
    """

    def __init__(self, high: int, low: int, hidden: int, grid: int, along: str) -> None:
        super().__init__()
        if grid % 2:
            raise ValueError(f"token pooling stacks 2 neighbours, but the feature grid has {grid} per side")
        self.grid = grid
        self.along = along
        self.high_up_proj = nn.Linear(2 * high, hidden)
        self.low_up_proj = nn.Linear(2 * low, hidden)
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, high_features: Tensor, low_features: Tensor) -> Tensor:
        """([i, p, c_high], [i, p, c_low]) -> [i, p, h], the first p/2 slots from the high-resolution tower."""
        high = self.high_up_proj(stack_neighbours(high_features, self.grid, self.along))  # [i, p/2, h]
        low = self.low_up_proj(stack_neighbours(low_features, self.grid, self.along))  # [i, p/2, h]
        return self.layers(torch.cat([high, low], dim=1))


def stack_neighbours(features: Tensor, grid: int, along: str) -> Tensor:
    """Put two neighbours of the grid into one vector: [i, g*g, c] -> [i, g*g/2, 2c], the left (or upper) one first."""
    i, _, c = features.shape
    if along == "width":
        return features.reshape(i, grid * grid // 2, 2 * c)  # neighbours in a row already lie side by side
    rows = features.view(i, grid // 2, 2, grid, c).transpose(2, 3)  # [i, g/2, g, 2, c]
    return rows.reshape(i, grid * grid // 2, 2 * c)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
