"""What ranks tell each other: one rank per data-parallel copy counts, any rank may ask to stop, padding is left out."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.training.rank_report import RankReport, document_lengths, exchange, report
from megavl.training.step_clock import PARTS


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


PARTS_OF_A_STEP = dict(zip(PARTS, (1.0, 2.0, 4.0, 3.0, 0.5, 0.25), strict=True))


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
    groups: Any = SimpleNamespace(tensor_rank=1, pipeline_rank=0)
    mine = report(batch, groups, stop=True, save=False, data_wait_s=0.5, parts=PARTS_OF_A_STEP, memory=2e9)
    assert mine == RankReport(
        stop=1,
        save=0,
        data_wait_s=0.5,
        counts=0,
        failed=1,
        images=3,
        tokens=13,
        squared_lengths=16 + 9 + 36,
        padded_squared_lengths=16 + 9 + 25 + 36,
        pipeline_rank=0,
        memory=2e9,
        **PARTS_OF_A_STEP,
    )


def test_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of two ranks: ranks 0 and 2 count, failures where they were met."""
    # After the counts: padded squared lengths, pipeline rank, memory, then vision, forward, backward, schedule, ...
    rows = [
        [0, 1, 0.1, 1, 1, 5, 100, 1000, 1100, 0, 5e9, 1.0, 2.0, 4.0, 3.0, 0.5, 0.1],
        [0, 0, 0.2, 0, 1, 5, 100, 1000, 1100, 1, 7e9, 0.0, 2.5, 5.0, 2.5, 0.5, 0.2],
        [0, 0, 0.9, 1, 1, 1, 40, 400, 500, 0, 5e9, 0.0, 2.0, 3.0, 5.0, 0.9, 0.1],
        [1, 0, 0.3, 0, 0, 1, 40, 400, 500, 1, 5e9, 0.0, 2.0, 6.0, 2.0, 0.5, 0.1],
    ]

    def all_gather(received: list[torch.Tensor], sent: torch.Tensor, group: Any) -> None:
        for tensor, row in zip(received, rows, strict=True):
            tensor.copy_(torch.tensor(row))

    monkeypatch.setattr(dist, "all_gather", all_gather)
    groups: Any = SimpleNamespace(world_size=4, gloo_world=None)
    names = [field.name for field in fields(RankReport)]
    totals = exchange(RankReport(**dict(zip(names, rows[0], strict=True))), groups)
    assert (totals.stop, totals.save, totals.failed, totals.images_spread) == (True, True, 3, 4)
    assert (totals.tokens, totals.squared_lengths) == (140, 1400)
    assert totals.data_wait_s == pytest.approx(0.9)
    assert (totals.padded_squared_lengths, totals.memory) == (1600, 7e9)
    longest = {"vision": 1.0, "forward": 2.5, "backward": 6.0, "reduction": 0.9, "optimizer": 0.2}
    assert totals.parts == pytest.approx(longest)
    assert totals.bubble == pytest.approx(((0.3 + 0.5) / 2, (0.25 + 0.2) / 2))
