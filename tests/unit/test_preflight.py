"""The preflight: what a run would be, and every problem at once; `parallel.layout = "auto"`."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small_stores import TOKENIZER, make_recipe, write_store

from megavl.config import CheckpointConfig, ParallelConfig, Recipe, SourceConfig
from megavl.model.sizes import SIZES, count_parameters
from megavl.planning import data_check, preflight
from megavl.planning.from_recipe import recipe_mix, resolve_layout
from megavl.planning.hardware import GIB, HARDWARE


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "Tokenizer", lambda path: TOKENIZER)


def source(path: str, modality: Any, share: float) -> SourceConfig:
    return SourceConfig(name=Path(path).name, path=path, modality=modality, share=share)


def small(tmp_path: Path, **fields: Any) -> Recipe:
    """Text and captions of one image; a row of 64 tokens holds an image of 16 and text."""
    text = write_store(tmp_path / "text", [40] * 30)
    images = write_store(tmp_path / "images", [12] * 20, [1] * 20, kind="caption")
    recipe = make_recipe((source(text, "language", 0.75), source(images, "multimodal", 0.25)), **fields)
    return dataclasses.replace(recipe, run_dir=str(tmp_path / "run"))


def test_a_run_without_problems(tmp_path: Path) -> None:
    lines, problems = preflight.preflight(small(tmp_path), 2, HARDWARE["cpu"])
    assert problems == []
    text = "\n".join(lines)
    for words in (
        "layout 4 ",
        "language step (75%",
        "images: multimodal, share 25.00%, 20 samples",
        "epochs",
        "saved only",
    ):
        assert words in text, text


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    recipe = small(tmp_path, seq_length=20, micro_batch=3)
    long = write_store(tmp_path / "long", [9, 30, 12], [1, 1, 3], kind="caption")
    called = write_store(tmp_path / "called", [20] * 4)
    sources = (
        *recipe.data.sources,
        source(long, "multimodal", 0.0),
        source(called, "multimodal", 0.0),
        source(str(tmp_path / "absent"), "language", 0.0),
    )
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=sources),
        parallel=ParallelConfig(tensor=8),
        checkpoint=CheckpointConfig(init_from=str(tmp_path / "nowhere")),
    )
    _, problems = preflight.preflight(recipe, 8, HARDWARE["cpu"])
    told = "\n".join(problems)
    for sentence in (
        "stage.global_batch 8 is not a multiple of micro_batch 3",
        "source images: 20 of 20 samples are longer than data.seq_length 20; the longest, sample 0, has 27 tokens",
        "source long: 3 of 3 samples are longer than data.seq_length 20; the longest, sample 2, has 57 tokens",
        "source long: 1 of 3 samples hold more images than fit, up to 3; data.seq_length 20 has room for 1 of 16",
        "source called: modality multimodal, but its 4 samples hold 0 images",
        "absent.idx: no such file",
        "model.decoder.heads 4 does not divide by parallel.tensor 8",
        "nowhere: there is no such folder",
    ):
        assert sentence in told, told


def test_a_share_that_no_row_comes_of(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    rare = write_store(tmp_path / "rare", [10] * 4)
    shares = (0.7499, 0.25)
    kept = [dataclasses.replace(s, share=x) for s, x in zip(recipe.data.sources, shares, strict=True)]
    data = dataclasses.replace(recipe.data, sources=(*kept, source(rare, "language", 0.0001)))
    _, problems = preflight.preflight(dataclasses.replace(recipe, data=data), 2, HARDWARE["cpu"])
    assert problems == [
        "source rare: its share 0.0001 of 160 rows comes to 0.02, and the run draws 0 rows of it; give it a "
        "larger share or more steps"
    ]


def test_a_rank_that_does_not_fit_is_named(tmp_path: Path) -> None:
    hardware = dataclasses.replace(HARDWARE["cpu"], memory_gib=0.001)
    lines, problems = preflight.preflight(small(tmp_path), 2, hardware)
    assert len(problems) == 1
    assert problems[0].startswith("pipeline rank 0 needs 0.0 GiB, most of it")
    assert any(line.startswith("does not fit") for line in lines)


def test_checkpoint_size() -> None:
    """All weights in bf16; master weight and two moments of what is trained."""
    recipe = dataclasses.replace(make_recipe(()), model=SIZES["7b"])
    counts = count_parameters(SIZES["7b"])
    trained = counts["decoder"] + counts["aligner"] + counts["sam_adaptor"]
    assert preflight.checkpoint_bytes(recipe) == 2 * sum(counts.values()) + 12 * trained
    assert preflight.checkpoint_bytes(recipe) / GIB == pytest.approx(91.2, abs=0.1)


def test_mean_rows(tmp_path: Path) -> None:
    """Streams fill rows; a caption of 12 tokens with an image takes 27, and a packed row of 64 holds 2.4 of them."""
    recipe = small(tmp_path)
    stores = data_check.check_data(recipe).stores
    text, images = (w.row for w in recipe_mix(recipe, stores))
    assert (text.tokens, text.images, text.squared_lengths) == (64, 0, 64 * 40)
    assert (images.tokens, images.images, images.squared_lengths) == (27, 1, 27**2)
    packed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing=True))
    full = recipe_mix(packed, stores)[1].row
    assert (full.tokens, full.images) == (64, 2)


def test_layout_auto_is_written_out(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    model = SIZES["7b"]
    light = dataclasses.replace(model.decoder, vocab=1024)
    for decoder, expected in ((model.decoder, "8,8,8,6"), (light, "7,8,8,7")):
        asked = dataclasses.replace(
            recipe,
            model=dataclasses.replace(model, decoder=decoder),
            data=dataclasses.replace(recipe.data, seq_length=4096, sources=recipe.data.sources[:1]),
            parallel=ParallelConfig(pipeline=4, layout="auto"),
        )
        resolved, plan = resolve_layout(asked, 4, "NVIDIA H200")
        assert resolved.parallel.layout == expected
        assert plan is not None
        assert plan.case.parallel.layout == expected


def test_layout_auto_plans_what_stands_at_its_default(tmp_path: Path) -> None:
    """All state of a 7B on one H200 leaves no room for activations; a field that says something else is kept."""
    recipe = dataclasses.replace(small(tmp_path), model=SIZES["7b"])
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, seq_length=4096, packing=True))
    for given, expected in (
        ({}, ("replicate", "full")),
        ({"tensor": 2}, ("split_model", "none")),
        ({"tensor": 2, "recompute": "selective"}, ("split_model", "selective")),
        ({"tensor": 2, "vision": "split_tensor"}, ("split_tensor", "none")),
    ):
        asked = dataclasses.replace(recipe, parallel=ParallelConfig(layout="auto", **given))
        resolved, plan = resolve_layout(asked, asked.parallel.tensor, "NVIDIA H200")
        assert (resolved.parallel.vision, resolved.parallel.recompute) == expected
        assert plan is not None
        assert plan.fits()
        lines, _ = preflight.preflight(asked, asked.parallel.tensor, HARDWARE["h200"])
        assert any(f"vision {expected[0]}, recompute {expected[1]}" in line for line in lines)


def test_a_run_that_does_not_fit_is_told_what_would(tmp_path: Path) -> None:
    recipe = dataclasses.replace(small(tmp_path), model=SIZES["7b"])
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, seq_length=4096, packing=True))
    lines, problems = preflight.preflight(recipe, 1, HARDWARE["h200"])
    assert any(problem.startswith("pipeline rank 0 needs") for problem in problems)
    assert "with parallel.recompute full it is estimated to fit" in lines


@pytest.mark.parametrize("parallel", [{}, {"tensor": 3, "layout": "auto"}, {"pipeline": 2, "layout": "1,3"}])
def test_nothing_to_plan(tmp_path: Path, parallel: dict[str, Any]) -> None:
    recipe = dataclasses.replace(small(tmp_path), parallel=ParallelConfig(**parallel))
    resolved, plan = resolve_layout(recipe, 2, "cpu")
    assert plan is None
    assert resolved.parallel.layout == parallel.get("layout", "").replace("auto", "")


def test_more_stages_than_layers(tmp_path: Path) -> None:
    recipe = dataclasses.replace(small(tmp_path), parallel=ParallelConfig(pipeline=8, layout="auto"))
    with pytest.raises(ValueError, match="8 pipeline stages, but the model has 4 layers"):
        resolve_layout(recipe, 8, "cpu")
