"""The loader: every layout and worker count reads the same, each image once, and nothing waits in vain."""

import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stores import EOS, MODEL, TOKENIZER, make_recipe, write_store

import megavl.data.collate
import megavl.data.rank_batch
from megavl.config import ParallelConfig, Recipe, SourceConfig
from megavl.data.loader import make_loader, validation_batches
from megavl.data.microbatch import EVERY_IMAGE, EVERY_PIXEL, IGNORE, NO_PIXELS, ImageShare, PixelRule, StepBatch
from megavl.data.store import Store

COUNT = 60
RANDOM = np.random.default_rng(5)
IMAGES = RANDOM.integers(0, 4, COUNT).tolist()
LENGTHS = (RANDOM.integers(4, 20, COUNT) + IMAGES).tolist()
CORPUS = RANDOM.integers(3, 120, 40).tolist()
BAD = 17


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    folder = tmp_path_factory.mktemp("stores")
    paths = {
        "text": write_store(folder / "text", CORPUS),
        "pictures": write_store(folder / "pictures", LENGTHS, IMAGES, kind="caption"),
        "damaged": write_store(folder / "damaged", [6] * 20, [1] * 20, kind="caption", bad=(BAD,)),
    }
    return {
        name: SourceConfig(name=name, path=path, modality="language" if name == "text" else "multimodal", share=0.5)
        for name, path in paths.items()
    }


def load(recipe: Recipe, rank: int = 0, size: int = 1, **fields: Any) -> list[StepBatch]:
    places: dict[str, Any] = {"pixels": EVERY_PIXEL, "length_multiple": 1, "equal_lengths": False, "start": 0}
    return list(make_loader(recipe, TOKENIZER, dp_rank=rank, dp_size=size, last_stage=True, **{**places, **fields}))


def samples_of(batches: list[StepBatch]) -> list[tuple[str, int]]:
    """Sample ids, sorted: who computes which of a step's depends on the data-parallel size."""
    return sorted(i for b in batches for m in b.micro_batches for i in m.sample_ids)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("grouping", ["step", "microbatch", "none"])
def test_the_same_samples_at_any_data_parallel_size_and_worker_count(
    sources: dict[str, SourceConfig], packing: bool, grouping: str
) -> None:
    recipe = make_recipe(
        (sources["text"], sources["pictures"]),
        packing=packing,
        grouping=grouping,
        seq_length=80,
        micro_batch=2,
        steps=6,
    )
    reference = load(recipe)
    whole = [samples_of([batch]) for batch in reference]
    assert len(whole) == 6
    for size, workers in ((1, 2), (2, 0), (4, 0)):
        with_workers = replace(recipe, data=replace(recipe.data, workers=workers))
        ranks = [load(with_workers, rank, size) for rank in range(size)]
        for step in range(6):
            batches = [r[step] for r in ranks]
            assert samples_of(batches) == whole[step]
            assert {b.language_rows for b in batches} == {reference[step].language_rows}
            assert {b.step for b in batches} == {step}
    if grouping != "none":
        assert all(m.modality is not None for b in reference for m in b.micro_batches)
        joined = torch.cat([m.tokens for r in zip(*ranks, strict=True) for b in r for m in b.micro_batches])
        assert len(joined) == sum(len(m.tokens) for b in reference for m in b.micro_batches)


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_is_read_once_across_resumes_that_change_the_data_parallel_size(
    sources: dict[str, SourceConfig], packing: bool
) -> None:
    recipe = make_recipe((sources["pictures"],), packing=packing, seq_length=80, global_batch=4, steps=40)
    read = Counter({("pictures", sample): 0 for sample in range(COUNT)})
    for size, start, stop in ((2, 0, 2), (1, 2, 5), (4, 5, 40)):
        ranks = [load(recipe, rank, size, start=start, stop=stop, pixels=NO_PIXELS) for rank in range(size)]
        for batches in zip(*ranks, strict=True):
            assert len({b.step for b in batches}) == 1
            read.update(samples_of(list(batches)))
            assert max(read.values()) - min(read.values()) <= 1  # none a second time before all a first time
    assert min(read.values()) >= 2
    uninterrupted = load(recipe, pixels=NO_PIXELS)
    assert read == Counter(samples_of(uninterrupted))


def test_each_rank_opens_its_share_of_the_images(
    sources: dict[str, SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe((sources["pictures"],), packing=True, seq_length=80, steps=5)
    opened: list[bytes] = []
    decode = megavl.data.collate.decode_image

    def counting(data: bytes, **rest: Any) -> Any:
        opened.append(data)
        return decode(data, **rest)

    monkeypatch.setattr(megavl.data.collate, "decode_image", counting)
    total = 0
    for rank in range(2):
        opened.clear()
        batches = load(recipe, rank, 2)
        expected = sum(IMAGES[s] for b in batches for m in b.micro_batches for _, s in m.sample_ids)
        assert len(opened) == expected == sum(m.num_images for b in batches for m in b.micro_batches)
        total += expected
    opened.clear()
    load(recipe, 1, 2, pixels=NO_PIXELS)
    assert not opened
    for first in range(3):
        load(recipe, pixels=PixelRule(rest=ImageShare(every=3, first=first)))
    assert len(opened) == total
    opened.clear()
    load(recipe)
    assert len(opened) == total


@pytest.mark.parametrize("size", [1, 2, 4])
def test_images_are_those_of_the_samples_they_come_with(sources: dict[str, SourceConfig], size: int) -> None:
    """`write_store` paints the number of the sample into its images."""
    recipe = make_recipe((sources["pictures"],), packing=True, seq_length=80, steps=5, workers=size % 2)
    seen = 0
    for batch in (batch for rank in range(size) for batch in load(recipe, rank, size)):
        for m in batch.micro_batches:
            painted = [] if m.pixels is None else m.pixels[:, 0, 0, 0].tolist()
            assert painted == [(7 * s + k) % 256 for _, s in m.sample_ids for k in range(IMAGES[s])]
            seen += len(painted)
    assert seen > COUNT / 2


def test_a_share_of_the_images_is_every_so_manieth_of_the_step(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["pictures"],), packing=True, seq_length=80, steps=5)
    shares = [load(recipe, pixels=PixelRule(rest=ImageShare(every=3, first=first))) for first in range(3)]
    for whole, *parts in zip(load(recipe), *shares, strict=True):
        count = 0
        for m, *thirds in zip(whole.micro_batches, *(p.micro_batches for p in parts), strict=True):
            assert m.images_before == count
            for image in m.pixels if m.pixels is not None else ():
                holder = thirds[count % 3]
                mine = holder.pixels_of(ImageShare(every=3, first=count % 3))
                place = list(holder.pixel_share.of(holder)).index(count - m.images_before)
                assert torch.equal(mine[place], image)
                count += 1
            with pytest.raises(ValueError, match="are wanted"):
                thirds[0].pixels_of(EVERY_IMAGE)


def test_another_share_of_the_first_images_of_a_step(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["pictures"],), packing=True, seq_length=80, steps=5)
    ahead, rest, limit = ImageShare(every=4, first=2), ImageShare(every=2, first=0), 5
    found = []
    for whole, part in zip(
        load(recipe), load(recipe, pixels=PixelRule(rest=rest, ahead=ahead, limit=limit)), strict=True
    ):
        for all_of, some in zip(whole.micro_batches, part.micro_batches, strict=True):
            share = ahead if some.images_before + some.num_images <= limit else rest
            assert some.pixel_share == share
            wanted = [all_of.pixels[i] for i in share.of(all_of)] if all_of.pixels is not None else []
            assert torch.equal(torch.stack(wanted), some.pixels) if wanted else some.pixels is None
            found.append(share)
    assert {ahead, rest} == set(found)


def test_images_are_dealt_evenly(sources: dict[str, SourceConfig]) -> None:
    """Against the rule of turns; rows have 0 to 3 images, so one image is the best that can be hoped for."""
    recipe = make_recipe((sources["pictures"],), global_batch=12, micro_batch=2, seq_length=80, steps=5)
    ranks = [load(recipe, rank, 3, pixels=NO_PIXELS) for rank in range(3)]
    for batches in zip(*ranks, strict=True):
        counts = [[m.num_images for m in b.micro_batches] for b in batches]
        assert max(sum(c) for c in counts) - min(sum(c) for c in counts) <= 1
        assert all(max(c) - min(c) <= 2 for c in counts)


def test_lengths_are_padded_for_the_pipeline(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["text"], sources["pictures"]), grouping="microbatch", seq_length=80, steps=4)
    plain = load(recipe)
    multiple = load(recipe, length_multiple=8)
    equal = load(recipe, length_multiple=8, equal_lengths=True)
    for a, b, c in zip(plain, multiple, equal, strict=True):
        lengths = [len(m.tokens) for m in b.micro_batches]
        assert lengths == [-(-len(m.tokens) // 8) * 8 for m in a.micro_batches]
        assert [len(m.tokens) for m in c.micro_batches] == [max(lengths)] * len(lengths)
        for x, y in zip(a.micro_batches, c.micro_batches, strict=True):
            end = len(x.tokens)
            assert torch.equal(x.tokens, y.tokens[:end])
            assert torch.equal(x.labels, y.labels[:end])
            assert (y.labels[end:] == IGNORE).all()
            assert torch.equal(x.cu_seqlens, y.cu_seqlens[: len(x.cu_seqlens)])
            assert y.cu_seqlens[-1] == len(y.tokens)
            assert y.max_document == y.cu_seqlens.diff().max()


def test_pixels_only_where_there_are_images(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["text"], sources["pictures"]), grouping="none", seq_length=80, steps=4)
    microbatches = [m for b in load(recipe) for m in b.micro_batches]
    assert {m.num_images == 0 for m in microbatches} == {True, False}
    for m in microbatches:
        assert (m.pixels is None) == (m.num_images == 0)
        assert len(m.image_slots) == m.num_images * MODEL.tokens_per_image
        assert m.pixels is None or len(m.pixels) == m.num_images


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_the_run_goes_on(sources: dict[str, SourceConfig], workers: int) -> None:
    recipe = make_recipe((sources["damaged"],), steps=3, workers=workers, global_batch=10)
    batches = load(recipe)
    failed = [s for b in batches for s in b.failed]
    seen = [s for b in batches for m in b.micro_batches for _, s in m.sample_ids].count(BAD)
    assert len(failed) == seen >= 1
    assert f"source damaged, sample {BAD}, image 0" in failed[0]
    assert "\n" not in failed[0]
    for rule in (NO_PIXELS, PixelRule(rest=EVERY_IMAGE, answers=False)):
        assert not any(b.failed for b in load(recipe, pixels=rule))


def broken_collation(*_: Any) -> Any:
    raise ValueError("source pictures, sample 3: 2 image placeholders in the tokens, 1 images")


def crashed_collation(*_: Any) -> Any:
    raise KeyError("inside")


def killed_collation(*_: Any) -> Any:
    os._exit(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_loader_process_is_one_sentence(
    sources: dict[str, SourceConfig], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    recipe = make_recipe((sources["pictures"],), workers=workers, seq_length=80)
    monkeypatch.setattr(megavl.data.rank_batch, "build_microbatch", broken_collation)
    with pytest.raises(ValueError, match=r"^step 0: source pictures, sample 3: 2 image .* 1 images$"):
        load(recipe)
    monkeypatch.setattr(megavl.data.rank_batch, "build_microbatch", crashed_collation)
    with pytest.raises(RuntimeError, match=r"step 0: reading failed(.|\n)*KeyError: 'inside'"):
        load(recipe)


def test_a_killed_loader_process_is_an_error_not_a_hang(
    sources: dict[str, SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megavl.data.rank_batch, "build_microbatch", killed_collation)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        load(make_recipe((sources["pictures"],), workers=2, seq_length=80))


def test_steps_are_read_ahead_while_the_model_computes(
    sources: dict[str, SourceConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After one `next`, the loader processes go on to the steps after it without being asked."""
    build, log = megavl.data.rank_batch.build_microbatch, tmp_path / "log"

    def logged(*args: Any) -> Any:
        with log.open("a") as file:
            file.write("built\n")
        return build(*args)

    monkeypatch.setattr(megavl.data.rank_batch, "build_microbatch", logged)
    recipe = make_recipe((sources["pictures"],), workers=2, seq_length=80, global_batch=1, steps=10)
    loader = make_loader(
        recipe, TOKENIZER, dp_rank=0, dp_size=1, pixels=EVERY_PIXEL, last_stage=True, length_multiple=1,
        equal_lengths=False, start=0,
    )  # fmt: skip
    assert next(loader).step == 0
    deadline = time.monotonic() + 600
    while len(log.read_text().split()) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(log.read_text().split()) == 5  # the step in use and two per process
    assert [batch.step for batch in loader] == list(range(1, 10))


def test_signals_to_the_group_of_the_training_process_miss_the_loader_processes(
    sources: dict[str, SourceConfig],
) -> None:
    """A launcher sends SIGTERM to the whole group; the training process needs batches until it has saved."""
    before = multiprocessing.active_children()
    recipe = make_recipe((sources["pictures"],), workers=2, seq_length=80)
    loader = make_loader(
        recipe, TOKENIZER, dp_rank=0, dp_size=1, pixels=EVERY_PIXEL, last_stage=True, length_multiple=1,
        equal_lengths=False, start=0,
    )  # fmt: skip
    _ = next(loader), next(loader)  # one from each process, so both have started
    children = [child for child in multiprocessing.active_children() if child not in before]
    assert len(children) == 2
    assert all(os.getpgid(child.pid or 0) != os.getpgid(0) for child in children)
    del loader
    assert not any(child.is_alive() for child in children)


def test_the_global_random_state_is_left_alone(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["pictures"],), workers=2, seq_length=80, steps=2)
    before = torch.get_rng_state()
    load(recipe)
    assert torch.equal(before, torch.get_rng_state())


def test_start_in_the_middle_and_nothing_left(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["pictures"],), seq_length=80, steps=5)
    assert [b.step for b in load(recipe, start=3)] == [3, 4]
    assert load(recipe, start=5) == []


def test_bad_divisions_and_names_are_errors(sources: dict[str, SourceConfig]) -> None:
    recipe = make_recipe((sources["pictures"],), seq_length=80, micro_batch=2)
    with pytest.raises(ValueError, match=r"global_batch 8 is no multiple of 6 = 3 data-parallel ranks x .* 2"):
        load(recipe, 0, 3)
    with pytest.raises(ValueError, match="two sources are named 'pictures'"):
        load(make_recipe((sources["pictures"], sources["pictures"])))


def test_a_language_source_holds_no_images(sources: dict[str, SourceConfig]) -> None:
    """Its steps would be dealt without a look at the images."""
    recipe = make_recipe((replace(sources["pictures"], modality="language"),), seq_length=80)
    with pytest.raises(ValueError, match=rf"source pictures: modality language, but .* hold {sum(IMAGES)} images"):
        load(recipe)


@pytest.mark.parametrize("name", ["text", "pictures"])
@pytest.mark.parametrize("virtual", [1, 2])
def test_validation_reads_the_first_rows_in_order(sources: dict[str, SourceConfig], name: str, virtual: int) -> None:
    recipe = make_recipe((sources["pictures"],), packing=True, seq_length=80, micro_batch=2)
    recipe = replace(
        recipe,
        logging=replace(recipe.logging, validation_rows=18),
        parallel=ParallelConfig(pipeline=2, virtual_pipeline=virtual),
    )
    place: dict[str, Any] = {"dp_size": 2, "first_stage": True, "length_multiple": 4, "equal_lengths": True}
    ranks = [validation_batches(recipe, TOKENIZER, sources[name], dp_rank=rank, **place) for rank in range(2)]
    # 8 + 8 + 2 rows, 4 at a time; an interleaved pipeline needs an even number of micro-batches.
    counts = [[len(b.micro_batches) for b in r] for r in ranks]
    assert counts[0] == counts[1] == [2, 2, virtual]
    together = [
        b for batches in zip(*ranks, strict=True) for b in zip(*(b.micro_batches for b in batches), strict=True)
    ]
    microbatches = [m for pair in together for m in pair]
    if name == "pictures":
        assert [i for m in microbatches for i in m.sample_ids] == [("pictures", s) for s in range(18)]
    else:
        store = Store(sources["text"].path)
        stream = np.concatenate([store.tokens(d) for d in range(len(CORPUS))])[: 18 * 80]
        assert (
            torch.cat([m.tokens for m in microbatches if m.sample_ids]).tolist() == stream.tolist()
        )  # rows of 80 need no padding to a multiple of 4
        assert [b.language_rows for b in ranks[1]] == [8, 8, 2]
    empty = [m for m in microbatches if not m.sample_ids]
    assert len(empty) == 1 + 2 * (virtual - 1)
    assert all(set(m.tokens.tolist()) == {EOS} and set(m.labels.tolist()) == {IGNORE} for m in empty)
    assert [b.step for b in ranks[0][1:]] == [1, 2]
    assert ranks[0][-1].step == 2
    with pytest.raises(IndexError, match="batch 3 of 3"):
        ranks[0][3]


def test_first_batch_of_a_large_index_opens_few_files(tmp_path: Path) -> None:
    count = 20_000
    prefix = write_store(tmp_path / "large", [4] * count, [0] * count, kind="caption")
    source = SourceConfig(name="large", path=prefix, modality="multimodal", share=1.0)
    opened: list[str] = []
    active = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active[0] and event == "open" and str(args[0]).startswith(str(tmp_path)):
            opened.append(str(args[0]))

    sys.addaudithook(hook)  # can not be removed, hence `active`
    batches = load(make_recipe((source,), packing=True), stop=1)
    active[0] = False
    assert len(batches[0].micro_batches) == 8
    assert len(opened) <= 20
