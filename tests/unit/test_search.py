"""The search: splits against enumeration, memory, large runs in seconds, and the command that prints plans."""

import dataclasses
import itertools
import math
import random
import re
import time
from pathlib import Path

import pytest

from megavl.config import ParallelConfig
from megavl.model.layer_split import split_layers
from megavl.model.sizes import SIZES
from megavl.parallel.stage_plan import stage_plan
from megavl.parallel.vision_ahead import encoded_shapes
from megavl.planning.candidates import PLACEMENTS, RECOMPUTE, with_parallel
from megavl.planning.costs import Case, ahead_bytes, ahead_s, images_ahead, part_costs, stage_times
from megavl.planning.estimate import Batch, make_mix, mixed_step_s, simulate_step
from megavl.planning.hardware import HARDWARE, read_calibration
from megavl.planning.memory import rank_memory
from megavl.planning.search import Plan, plan_layout, plan_sizes, plan_split, search
from megavl.planning.split import StageLoad, best_split
from megavl.planning.timeline import draw_timeline
from megavl.training.flops import StepCounts
from tools.plan_pipeline import main

ROW = StepCounts(images=4, tokens=4096, squared_lengths=4096**2, logits=4096)


def case(name: str = "7b", stage: int = 2, hardware: str = "h200", **parallel: object) -> Case:
    return Case(
        model=SIZES[name],
        stage=stage,
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        hardware=HARDWARE[hardware],
    )


def expected(loads: list[StageLoad], split: tuple[int, ...]) -> float:
    ranks = len(split)
    return sum(
        load.share * max(load.rank_seconds(rank, ranks, count) for rank, count in enumerate(split)) for load in loads
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_enumerated_split_beats_the_dynamic_program(seed: int) -> None:
    draw = random.Random(seed)
    ranks, layers = draw.randint(2, 5), draw.randint(5, 12)
    share = draw.choice((0.3, 0.5, 0.7))
    loads = [  # kinds of step that disagree about the slowest rank
        StageLoad(share=share, layer=draw.uniform(0.8, 1.2), first=draw.uniform(0, 1), last=draw.uniform(0, 3)),
        StageLoad(share=1 - share, layer=draw.uniform(0.8, 1.2), first=draw.uniform(1, 5), last=draw.uniform(0, 3)),
    ]
    caps = [draw.randint(layers // ranks + 1, layers) for _ in range(ranks)] if seed % 2 else None
    splits = [
        split
        for split in itertools.product(range(1, layers + 1), repeat=ranks)
        if sum(split) == layers and all(n <= cap for n, cap in zip(split, caps or split, strict=True))
    ]
    found = best_split(loads, layers, ranks, caps=caps)
    assert found in splits
    assert expected(loads, found) == pytest.approx(min(expected(loads, split) for split in splits), abs=1e-9)


def test_splits_that_cannot_be() -> None:
    load = StageLoad(share=1.0, layer=1.0, first=0.0, last=0.0)
    assert best_split([load], 3, 4) is None
    assert best_split([load], 8, 4, virtual=3) is None
    assert best_split([load], 8, 2, caps=[3, 4]) is None
    assert best_split([load], 8, 2, virtual=2) == (2, 2, 2, 2)


@pytest.mark.parametrize(("name", "gpus", "rows"), [("7b", 512, 2304), ("7b", 10_000, 40_000)])
def test_large_runs_are_planned_in_seconds(name: str, gpus: int, rows: int) -> None:
    start = time.process_time()
    plans = search(case(name, sequence=True), make_mix(4096, 0.7, 4), gpus=gpus, global_batch=rows)
    assert time.process_time() - start < 60  # CPU time; 4 to 6 s on one core
    for plan in plans:
        parallel = plan.case.parallel
        assert plan.batch.data * parallel.tensor * parallel.pipeline == gpus
        assert plan.batch.rows == rows
        assert plan.fits()
        assert min(split_layers(plan.case.model.decoder.layers, parallel)) >= 1
        assert stage_plan(plan.case.model, parallel)
    times = [plan.expected_s for plan in plans]
    assert times == sorted(times)


def test_memory_decides() -> None:
    """What one device cannot hold goes to more of them; what none can is refused with the nearest."""
    mix = make_mix(4096, 0.7, 4)
    roomy = search(case(), mix, gpus=8, global_batch=64, micro_batch=1)[0]
    tight = dataclasses.replace(case(), hardware=dataclasses.replace(HARDWARE["h200"], memory_gib=48))
    plan = search(tight, mix, gpus=8, global_batch=64, micro_batch=1)[0]
    assert plan.peak_bytes < 48 * 2**30 < roomy.peak_bytes
    assert plan.expected_s >= roomy.expected_s
    none = dataclasses.replace(case(), hardware=dataclasses.replace(HARDWARE["h200"], memory_gib=2))
    with pytest.raises(ValueError, match=r"fits 2 GiB, .* recompute full, "):
        search(none, mix, gpus=8, global_batch=64, micro_batch=1)
    with pytest.raises(ValueError, match="no layout divides 7 ranks and 64 rows"):
        search(case(), mix, gpus=7, global_batch=64, fixed=["pipeline"])


def test_search_equals_trying_everything() -> None:
    """SigLIP trains and memory is short: sizes, placements and both switches, each combination by itself."""
    mix, gib = make_mix(4096, 0.5, 4), 40.0
    machine = dataclasses.replace(HARDWARE["h200"], memory_gib=gib)
    base = dataclasses.replace(case("1.3b_hybrid", 3, sequence=True, virtual_pipeline=1), hardware=machine)
    found = search(base, mix, gpus=2, global_batch=8, micro_batch=2, fixed=["virtual_pipeline"])
    tried = []
    for (tensor, pipeline), vision, kind, again in itertools.product(
        ((1, 1), (2, 1), (1, 2)), PLACEMENTS, RECOMPUTE, (False, True)
    ):
        fields = {"tensor": tensor, "pipeline": pipeline, "vision": vision, "recompute": kind}
        one = with_parallel(base, **fields, recompute_vision=again, sequence=tensor > 1)
        batch = Batch(micro_batch=2, micro_batches=2 * tensor * pipeline, data=2 // (tensor * pipeline))
        plan = plan_split(one, mix, batch)
        assert plan is not None
        tried.append(plan_layout(plan.case, mix, plan.batch))
    fitting = [plan for plan in tried if plan.fits()]
    assert 0 < len(fitting) < len(tried)
    assert found[0].expected_s == pytest.approx(min(plan.expected_s for plan in fitting), rel=1e-9)
    roomy = dataclasses.replace(base, hardware=HARDWARE["h200"])
    fastest = search(roomy, mix, gpus=2, global_batch=8, micro_batch=2, fixed=["virtual_pipeline"])[0]
    assert fastest.expected_s < found[0].expected_s  # memory did decide
    assert (fastest.case.parallel.recompute, fastest.case.parallel.recompute_vision) == ("none", False)


def test_the_least_recomputation_that_fits() -> None:
    """With the memory that each kind takes, and no more, that kind is chosen; what is fixed stays as it is."""
    mix, batch = make_mix(4096, 1.0, 0), Batch(micro_batch=2, micro_batches=8, data=8)
    needed = [plan_layout(case(recompute=kind), mix, batch).peak_bytes / 2**30 / 0.92 for kind in RECOMPUTE]
    assert needed == sorted(needed, reverse=True)
    for kind, gib in zip(RECOMPUTE, needed, strict=True):
        tight = dataclasses.replace(case(), hardware=dataclasses.replace(HARDWARE["h200"], memory_gib=gib + 0.01))
        plan = plan_sizes(tight, mix, batch)
        assert plan is not None
        assert (plan.case.parallel.recompute, plan.fits()) == (kind, True)
        kept = plan_sizes(tight, mix, batch, fixed=["recompute"])
        assert kept is not None
        assert (kept.case.parallel.recompute, kept.fits()) == ("none", kind == "none")


def test_fixed_fields_are_kept() -> None:
    mix, fields = make_mix(4096, 0.5, 4), {"vision": "split_tensor", "recompute": "selective", "pipeline": 2}
    setting = case("1.3b_hybrid", **fields)
    plans = search(setting, mix, gpus=8, global_batch=64, fixed=list(fields), micro_batch=1)
    assert all(getattr(plan.case.parallel, name) == value for plan in plans for name, value in fields.items())
    free = search(setting, mix, gpus=8, global_batch=64, fixed=["pipeline"], micro_batch=1)
    assert {plan.case.parallel.vision for plan in free} == set(PLACEMENTS)
    assert {plan.case.parallel.recompute for plan in free} == {"none"}  # all of them fit


@pytest.mark.parametrize("virtual", [1, 3])
def test_a_long_step_is_continued_from_its_first_rounds(virtual: int) -> None:
    layout = "8,8,8,6" if virtual == 1 else "2,2,2,2,3,3,3,3,3,3,3,1"
    setting = case(pipeline=4, virtual_pipeline=virtual, layout=layout)
    times = stage_times(setting, ROW)
    estimate = plan_layout(setting, make_mix(4096, 0.0, 4), Batch(micro_batch=1, micro_batches=160, data=1)).steps[0]
    whole = simulate_step(setting, [times] * 160).step_s
    assert estimate.pipeline_s == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_features_that_run_ahead_are_those_of_the_encoder(stage: int) -> None:
    setting = case(stage=stage, vision="split_model", tensor=2, pipeline=2)
    frozen = {"sam", "siglip"} - setting.trained
    per_image = sum(math.prod(shape) for shape in encoded_shapes(setting.model, frozen).values()) * setting.element
    assert ahead_bytes(setting) == per_image
    assert images_ahead(setting, 10_000) == 4 * ((4096 << 20) // (3 * per_image))
    assert images_ahead(setting, 12) == 12
    here = case(stage=stage, vision="split_tensor", tensor=2, pipeline=2)
    ahead, beside = (rank_memory(one, ROW, micro_batches=8, data=1) for one in (setting, here))
    extra = [(a.activations - b.activations) / per_image for a, b in zip(ahead, beside, strict=True)]
    assert extra == [16 + 8, 8]  # 32 images: a tensor rank's half, and a quarter of the next step's


def test_a_full_rank_gives_layers_away() -> None:
    """The split without a memory limit does not fit; the one that is returned does, with fewer layers on rank 0."""
    mix, batch = make_mix(4096, 1.0, 0), Batch(micro_batch=1, micro_batches=32, data=1)
    free = plan_split(case(pipeline=4), mix, batch)
    assert free is not None
    first, second, *_ = (memory.total for memory in free.memory)
    limit = (first + second) / 2 / 2**30 / 0.92
    tight = dataclasses.replace(case(pipeline=4), hardware=dataclasses.replace(HARDWARE["h200"], memory_gib=limit))
    limited = plan_split(tight, mix, batch)
    assert limited is not None
    assert not dataclasses.replace(free, case=tight).fits()
    assert limited.fits()
    assert free.case.parallel.layout == "8,8,8,6"
    assert int(limited.case.parallel.layout.split(",")[0]) < 8


@pytest.mark.parametrize(("stage", "frozen"), [(1, {"sam", "siglip"}), (2, {"sam", "siglip"}), (3, {"sam"})])
def test_what_trains_decides_the_backward_pass(stage: int, frozen: set[str]) -> None:
    costs = part_costs(case(stage=stage), ROW)
    assert {name for name in ("sam", "siglip", "aligner", "sam_adaptor") if not costs[name].backward_s} == frozen
    whole = part_costs(case(stage=2), ROW)["layer"]
    # A frozen layer passes gradients on but makes none of its own: one product instead of two, attention as ever.
    assert (costs["layer"].backward_s < 0.6 * whole.backward_s) == (stage == 1)


def test_recomputation_costs_time_and_saves_memory() -> None:
    kinds = ("none", "selective", "full")
    times = [stage_times(case(recompute=kind), ROW).both[0] for kind in kinds]
    bytes_ = [rank_memory(case(recompute=kind), ROW, micro_batches=4, data=1)[0].activations for kind in kinds]
    assert times == sorted(times)
    assert bytes_ == sorted(bytes_, reverse=True)
    assert bytes_[2] < bytes_[0] / 4


def test_towers_of_stage_three_run_ahead_only_while_frozen() -> None:
    """SAM leaves the schedule, the trained SigLIP stays, cut over the tensor group."""
    ahead = case(stage=3, vision="split_model", tensor=2, pipeline=2)
    here = case(stage=3, vision="replicate", tensor=2, pipeline=2)
    assert part_costs(ahead, ROW)["siglip"].backward_s == pytest.approx(part_costs(here, ROW)["siglip"].backward_s / 2)
    towers = part_costs(here, ROW)["sam"].forward_s / ROW.images
    # One of two pipeline ranks sends 32 images of 8.4 MB at 350 GB/s, eight at a time.
    assert ahead_s(ahead, 128) == pytest.approx(32 * towers + 32 * ahead_bytes(ahead) / 350e9 + 4 * 20e-6)
    assert ahead_s(here, 128) == 0
    rest = rank_memory(ahead, ROW, micro_batches=4, data=1)[1].parameters
    assert rest > rank_memory(here, ROW, micro_batches=4, data=1)[1].parameters  # a copy of SAM on every rank


def a_plan(**parallel: object) -> Plan:
    setting = case(pipeline=4, layout="8,8,8,6", **parallel)
    return plan_layout(setting, make_mix(4096, 0.7, 4), Batch(micro_batch=1, micro_batches=32, data=1))


def test_timeline(tmp_path: Path) -> None:
    plan = a_plan()
    draw_timeline(plan, tmp_path / "plan.html")
    draw_timeline(plan, tmp_path / "plan.png")
    page = (tmp_path / "plan.html").read_text()
    assert len(re.findall("<rect ", page)) == 2 * 4 * 2 * 24  # kinds, ranks, passes, micro-batches drawn
    assert "24 of its 32 micro-batches" in page
    assert "layout 8,8,8,6" in page
    assert "http" not in page  # needs nothing else
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="write a .png or an .html, not .pdf".replace(".", r"\.")):
        draw_timeline(plan, tmp_path / "plan.pdf")


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--tensor", "1", "--pipeline", "4", "--timeline", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("layout 8,8,8,6 ")
    assert "--parallel.layout 8,8,8,6" in out
    assert (tmp_path / "a.html").exists()
    for options, sentence in (
        (["--tensor", "3", "--pipeline", "2"], "no layout divides 6 ranks"),
        (["--images", "8"], "--images 8 take 4608 tokens, --seq-length is 4096"),
        (["--pipeline", "0"], "--pipeline 0 is below 1"),
        (["--gpus", "6", "--tensor", "4"], "--gpus 6 does not divide by tensor * pipeline 4 * 1"),
        (["--calibration", str(tmp_path / "none.json")], "none.json"),
    ):
        assert main(options) == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "Expecting"),
        ("{}", "no field 'parts'"),
        ('{"parts": {"layer": {"work": {"forward": 1}, "seconds": {"forward": 0}}}}', "which is not above 0"),
    ],
)
def test_a_calibration_that_cannot_be_read(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_calibration(path, HARDWARE["cpu"])


def test_equal_micro_batches_are_a_plain_step() -> None:
    """A step whose micro-batches may differ: as planned where they do not, else between text and images."""
    setting = case(pipeline=4, layout="8,8,8,6", vision="split_model")
    batch = Batch(micro_batch=1, micro_batches=8, data=2)
    text, images = plan_layout(setting, make_mix(4096, 0.5, 4), batch).steps
    rows = [dataclasses.replace(ROW, images=0), ROW]
    assert mixed_step_s(setting, [rows[0]] * 8, 2) == pytest.approx(text.step_s, rel=1e-9)
    assert mixed_step_s(setting, [rows[1]] * 8, 2) == pytest.approx(images.step_s, rel=1e-9)
    assert text.step_s < mixed_step_s(setting, rows * 4, 2) < images.step_s
