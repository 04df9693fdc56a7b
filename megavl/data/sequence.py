"""Turn the stored form of a sample into what the model reads: images at full length, labels shifted.

In: token ids with one placeholder per image, and which of them are targets. Out: ids with `tokens_per_image`
placeholders per image, the label of each position, and where the images are.

A label is the id that *follows* a position. Image positions are never labels; the last position of an image predicts
the text after it, as in every decoder trained with shifted labels. Shapes: n stored tokens, t = n + i*(p-1) expanded
tokens, i images, p positions per image (576).
"""

import numpy as np
from numpy.typing import NDArray

from megavl.data.microbatch import IGNORE


def expanded_length(num_tokens: int, num_images: int, tokens_per_image: int) -> int:
    """Length t after expansion of a sample with `num_tokens` stored tokens."""
    return num_tokens + num_images * (tokens_per_image - 1)


def expand(
    tokens: NDArray[np.integer],
    learn: NDArray[np.bool_],
    image_id: int,
    tokens_per_image: int,
    num_images: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Expand placeholders and shift labels within one document.

    Args:
        tokens: stored ids, [n].
        learn: whether each id is a target, [n]. Ignored at placeholders.
        image_id: id of the placeholder; a negative id means that there is none.
        tokens_per_image: p, at least 1.
        num_images: images that come with the sample, to check against; None: no check.

    Returns:
        tokens int64 [t]; labels int64 [t], `IGNORE` where nothing is learnt and at the last position; image_slots
        int64 [i*p], the positions of the images in reading order.

    Raises:
        ValueError: placeholders and images differ in number, or tokens and learn differ in length.
    """
    if len(tokens) != len(learn):
        raise ValueError(f"{len(tokens)} tokens but {len(learn)} learn flags")
    is_image = np.asarray(tokens) == image_id  # [n]
    found = int(is_image.sum())
    if num_images is not None and found != num_images:
        raise ValueError(f"{found} image placeholders in the tokens, {num_images} images")
    repeats = np.where(is_image, tokens_per_image, 1)
    full = np.repeat(np.asarray(tokens, dtype=np.int64), repeats)  # [t]
    full_is_image = np.repeat(is_image, repeats)  # [t]
    target = np.repeat(np.asarray(learn, dtype=bool), repeats) & ~full_is_image  # [t]
    labels = np.full(len(full), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(target[1:], full[1:], IGNORE)
    return full, labels, np.flatnonzero(full_is_image).astype(np.int64)
