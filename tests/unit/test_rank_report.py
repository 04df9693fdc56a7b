"""What ranks tell each other: one rank per data-parallel copy counts, any rank may ask to stop, padding is left out."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavl.data.microbatch import EVERY_IMAGE, IGNORE, ImageShare, MicroBatch, StepBatch
from megavl.training.rank_report import RankReport, document_lengths, exchange, own_failures, report


def micro_batch(lengths: list[int], padding: int, images: int = 0) -> MicroBatch:
    total = sum(lengths) + padding
    bounds = [0, *torch.tensor([*lengths, padding] if padding else lengths).cumsum(0).tolist()]
    labels = torch.arange(total)
    labels[[b - 1 for b in bounds[1:]]] = IGNORE  # the last position of a document has no label
    labels[sum(lengths) :] = IGNORE
    return MicroBatch(
        tokens=torch.zeros(total, dtype=torch.int64),
        labels=labels,
        positions=torch.arange(total),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_document=max([*lengths, padding]),
        pixels=None,
        image_slots=torch.zeros(0, dtype=torch.int64),
        num_images=images,
        modality=None,
        sample_ids=(),
    )


@pytest.mark.parametrize(("lengths", "padding"), [([4, 3], 0), ([4, 3], 5), ([4], 1), ([], 6)])
def test_padding_is_left_out(lengths: list[int], padding: int) -> None:
    assert document_lengths(micro_batch(lengths, padding)).tolist() == lengths


def test_own_report() -> None:
    batch = StepBatch(
        step=0,
        language_rows=0,
        micro_batches=(micro_batch([4, 3], 5, images=2), micro_batch([6], 0, images=1)),
        failed=("bad",),
    )
    groups: Any = SimpleNamespace(tensor_rank=1, pipeline_rank=0, is_first_stage=True)
    mine = report(batch, groups, stop=True, save=False, data_wait_s=0.5)
    assert mine == RankReport(
        stop=1, save=0, data_wait_s=0.5, counts=0, failed=0, images=3, tokens=13, squared_lengths=16 + 9 + 36
    )


@pytest.mark.parametrize(
    ("share", "answering"),
    [(EVERY_IMAGE, [(0, 0)]), (ImageShare(every=2, first=1), [(0, 0), (1, 0)])],
)
def test_each_bad_image_has_one_rank_to_answer_for_it(share: ImageShare, answering: list[tuple[int, int]]) -> None:
    """Tensor ranks that decode every image see each bad one; those that share them see their own."""
    batch = StepBatch(
        step=0, language_rows=0, micro_batches=(replace(micro_batch([4], 0), pixel_share=share),), failed=("bad",)
    )
    places = [(t, p) for t in range(2) for p in range(2)]
    groups: list[Any] = [SimpleNamespace(tensor_rank=t, is_first_stage=p == 0) for t, p in places]
    assert [place for place, of in zip(places, groups, strict=True) if own_failures(batch, of)] == answering


def test_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of two ranks: ranks 0 and 2 count, failures where they were met."""
    rows = [
        [0, 1, 0.1, 1, 1, 5, 100, 1000],
        [0, 0, 0.2, 0, 1, 5, 100, 1000],
        [0, 0, 0.9, 1, 1, 1, 40, 400],
        [1, 0, 0.3, 0, 0, 1, 40, 400],
    ]

    def all_gather(received: list[torch.Tensor], sent: torch.Tensor, group: Any) -> None:
        for tensor, row in zip(received, rows, strict=True):
            tensor.copy_(torch.tensor(row))

    monkeypatch.setattr(dist, "all_gather", all_gather)
    groups: Any = SimpleNamespace(world_size=4, gloo_world=None)
    names = ("stop", "save", "data_wait_s", "counts", "failed", "images", "tokens", "squared_lengths")
    totals = exchange(RankReport(**dict(zip(names, rows[0], strict=True))), groups)
    assert (totals.stop, totals.save, totals.failed, totals.images_spread) == (True, True, 3, 4)
    assert (totals.tokens, totals.squared_lengths) == (140, 1400)
    assert totals.data_wait_s == pytest.approx(0.9)
