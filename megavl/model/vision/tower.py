"""From the pixels of a micro-batch to the features of one or two towers.

In: images in [0, 1], not normalised, at the model's image size. Out: the features of the high-resolution tower (or
None) and of the low-resolution tower, on the same grid. Each tower normalises its own input, so nothing before this
file may. The low-resolution image is made from the padded high-resolution one, as the released 7B does.

Shapes: i images, S side of the model's image, s side of the low-resolution image, p slots per image.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from megavl.config import ModelConfig
from megavl.model.vision.sam import SamTower
from megavl.model.vision.siglip import SiglipTower
from megavl.ops import PLAIN, Ops

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""RGB mean of the high-resolution tower's input."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""RGB standard deviation of the high-resolution tower's input."""
HALF = (0.5, 0.5, 0.5)
"""RGB mean and standard deviation of SigLIP's input."""
SAM_ADAPTOR_PREFIXES = ("downsamples.", "neck_hd.", "hd_alpha_downsamples")
"""Parameters below `sam` that belong to the vision-language adaptor (trained in stage 1), not to SAM itself."""


class VisionTowers(nn.Module):
    """The towers of a model: `siglip`, and `sam` or None."""

    def __init__(self, model: ModelConfig, *, recompute: bool = False, ops: Ops = PLAIN) -> None:
        """Build the towers with torch's initial values; see `initialise_vision`.

        Args:
            model: sizes.
            recompute: run SigLIP's blocks again in the backward pass instead of keeping their activations.
            ops: fused operators.
        """
        super().__init__()
        self.low_size = model.siglip.image_size
        self.sam = SamTower(model.sam, ops) if model.sam else None
        self.siglip = SiglipTower(model.siglip, recompute=recompute)

    def forward(
        self, pixels: Tensor | None, encoded: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Encode images.

        Args:
            pixels: fp32 in [0, 1], [i, 3, S, S]; None if `encoded` has all that is made of them.
            encoded: from `encode_frozen`, of the same images.

        Returns:
            High-resolution features [i, p, c_high] or None, and low-resolution features [i, p, c_low].
        """
        encoded = encoded or {}
        low_features = encoded["siglip"] if "siglip" in encoded else self._encode_low(pixels)
        if self.sam is None:
            return None, low_features
        if "neck" in encoded:
            return self.sam(None, (encoded["neck"], encoded["branch"])), low_features
        return self.sam(self._high_input(pixels)), low_features

    def encode_frozen(self, pixels: Tensor, frozen: Collection[str]) -> dict[str, Tensor]:
        """The part of `forward` that depends on frozen parameters only.

        Args:
            pixels: fp32 in [0, 1], [i, 3, S, S].
            frozen: frozen parts of the model; `sam` and `siglip` count here.

        Returns:
            `neck` [i, k, g, g] and `branch` [i, g, g, c] where there is a frozen SAM (see `SamTower.trunk`), and
            `siglip` [i, p, c_low] where SigLIP is frozen.
        """
        encoded = {}
        if self.sam is not None and "sam" in frozen:
            encoded["neck"], encoded["branch"] = self.sam.trunk(self._high_input(pixels))
        if "siglip" in frozen:
            encoded["siglip"] = self._encode_low(pixels)
        return encoded

    def needs_pixels(self, encoded: Mapping[str, Tensor] | None) -> bool:
        """Whether `forward` reads pixels beside `encoded`."""
        return encoded is None or "siglip" not in encoded or (self.sam is not None and "neck" not in encoded)

    def compile_frozen(self, backend: str = "inductor") -> int:
        """Have `torch.compile` make each block of a tower that trains nothing; `requires_grad` must be set.

        Blocks, not whole towers: those of a tower share one compilation, which is made for any number of images. Names
        and parameters stay as they are.

        Args:
            backend: torch.compile's.

        Returns:
            Blocks that will be compiled when they first run.
        """
        count = 0
        for tower in [part for part in self.children() if isinstance(part, SamTower | SiglipTower)]:
            if not any(p.requires_grad for p in tower.blocks.parameters()):
                for block in tower.blocks:
                    block.compile(dynamic=True, backend=backend)
                count += len(tower.blocks)
        return count

    def _high_input(self, pixels: Tensor | None) -> Tensor:
        assert pixels is not None, "SAM has nothing to encode"
        assert self.sam is not None, "there is no SAM"
        return normalise(pixels, CLIP_MEAN, CLIP_STD).to(self.sam.pos_embed.dtype)

    def _encode_low(self, pixels: Tensor | None) -> Tensor:
        assert pixels is not None, "SigLIP has nothing to encode"
        low = normalise(resize_antialiased(pixels, self.low_size), HALF, HALF)
        return self.siglip(low.to(self.siglip.pos_embed.dtype))


def resize_antialiased(pixels: Tensor, side: int) -> Tensor:
    """Bilinear resize, torchvision's `Resize(antialias=True)` on a tensor: [i, 3, S, S] -> [i, 3, s, s]."""
    if pixels.shape[-1] == side:
        return pixels
    return functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std per channel, [i, 3, S, S].

    Channel by channel with numbers of the host: a tensor made here would make the host wait for the device.
    """
    channels = [(pixels[:, c] - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels, dim=1)


@torch.no_grad()
def initialise_vision(module: nn.Module, generator: torch.Generator) -> None:
    """Fill towers or an adaptor with random values that depend on the generator alone.

    Values are drawn on the CPU in fp32 in the order in which parameters were defined, so every rank and every device
    gets the same towers from the same seed. A tower's linear layers and position tables: truncated normal, standard
    deviation 0.02 (timm); narrow towers 0.4 / sqrt(width), which keeps the spread of random features. Convolutions:
    torch's uniform. An adaptor's linear layers: normal, 1 / sqrt(fan in). Biases and alpha are 0, norms 1 and 0.

    Args:
        module: a `VisionTowers`, one tower, or an adaptor.
        generator: CPU generator; it is advanced.
    """
    towers = [part for part in module.modules() if isinstance(part, SamTower | SiglipTower)]
    tower_std = {id(p): max(0.02, 0.4 * t.pos_embed.shape[-1] ** -0.5) for t in towers for p in t.parameters()}
    norms = {id(part.weight) for part in module.modules() if isinstance(part, nn.LayerNorm)}
    for name, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        fan_in = values[0].numel()
        if id(parameter) in norms:
            values.fill_(1.0)
        elif name.endswith(("bias", "hd_alpha_downsamples")):
            pass
        elif values.dim() == 4 and not name.endswith("pos_embed"):
            values.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif std := tower_std.get(id(parameter)):
            nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            values.normal_(std=fan_in**-0.5, generator=generator)
        parameter.copy_(values)
