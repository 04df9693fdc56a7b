"""Placeholder expansion and shifted labels, against a loop that writes them out one token at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.microbatch import IGNORE
from megavl.data.sequence import expand, expanded_length

IMAGE = 99


def expand_by_loop(tokens: list[int], learn: list[bool], per_image: int) -> tuple[list[int], list[int], list[int]]:
    ids: list[int] = []
    targets: list[int] = []
    for token, flag in zip(tokens, learn, strict=True):
        for _ in range(per_image if token == IMAGE else 1):
            ids.append(token)
            targets.append(token if flag and token != IMAGE else IGNORE)
    labels = [*targets[1:], IGNORE][: len(ids)]
    return ids, labels, [i for i, token in enumerate(ids) if token == IMAGE]


pairs = st.lists(st.tuples(st.one_of(st.just(IMAGE), st.integers(0, 98)), st.booleans()), max_size=30)


@settings(deadline=None)
@given(pairs=pairs, per_image=st.integers(1, 7))
def test_expand_equals_the_loop(pairs: list[tuple[int, bool]], per_image: int) -> None:
    tokens, learn = [p[0] for p in pairs], [p[1] for p in pairs]
    images = tokens.count(IMAGE)
    result = expand(np.array(tokens, np.int32), np.array(learn, bool), IMAGE, per_image, images)
    expected = expand_by_loop(tokens, learn, per_image)
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == np.int64
        assert got.tolist() == want
    full, labels, slots = result
    assert len(full) == expanded_length(len(tokens), images, per_image)
    assert len(slots) == images * per_image
    assert not (labels == IMAGE).any()


def test_the_last_image_position_predicts_the_text_after_it() -> None:
    tokens, labels, slots = expand(np.array([1, IMAGE, 5, 2]), np.array([False, False, True, True]), IMAGE, 3)
    assert tokens.tolist() == [1, IMAGE, IMAGE, IMAGE, 5, 2]
    assert labels.tolist() == [IGNORE, IGNORE, IGNORE, 5, 2, IGNORE]
    assert slots.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("given_images", "found"), [(0, 2), (3, 2), (1, 2)])
def test_mismatch_names_both_numbers(given_images: int, found: int) -> None:
    tokens = np.array([1, IMAGE, 7, IMAGE, 2])
    with pytest.raises(ValueError, match=f"{found} image placeholders in the tokens, {given_images} images"):
        expand(tokens, np.ones(5, bool), IMAGE, 4, given_images)


def test_flags_of_another_length() -> None:
    with pytest.raises(ValueError, match="3 tokens but 2 learn flags"):
        expand(np.array([1, 2, 3]), np.ones(2, bool), IMAGE, 4)
