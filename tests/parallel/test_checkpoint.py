"""Saved and loaded: resumed runs equal uninterrupted ones under any layout; what goes wrong is a sentence."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import (
    MODEL,
    ROWS,
    Plan,
    fill_disk_of_rank_zero,
    kill_writer_of_rank_one,
    refusal,
    train,
    train_and_die,
    wait_for_orphans,
)
from safetensors.torch import save_file
from torch import Tensor
from world import World, WorldError

from megavl.checkpoint.folder import CheckpointError, find_newest
from megavl.checkpoint.index import read_index
from megavl.config import ParallelConfig

TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
DP2 = ParallelConfig()
DP2_SHARDED = ParallelConfig(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
TP2_DP2_SP = ParallelConfig(tensor=2, sequence=True, distributed_optimizer=True)
PP2_VPP2_DP2 = ParallelConfig(pipeline=2, virtual_pipeline=2, distributed_optimizer=True)

SAME_LAYOUT = {
    "tp2pp2": (Plan(parallel=TP2_PP2), 4),
    "dp2_sharded_overlapped": (Plan(parallel=DP2_SHARDED), 2),
    "tp2dp2sp_bf16": (Plan(parallel=TP2_DP2_SP, stage=2, dtype=torch.bfloat16), 4),
    "tp2_bf16": (Plan(parallel=ParallelConfig(tensor=2), dtype=torch.bfloat16), 2),
    "pp2vpp2dp2_a_rank_trains_nothing": (Plan(parallel=PP2_VPP2_DP2, stage=1), 4),
    "pp2_the_first_rank_trains_little": (Plan(parallel=ParallelConfig(pipeline=2, layout="0,4"), stage=0), 2),
}
OTHER_LAYOUTS = {
    "dp4_sharded": (ParallelConfig(distributed_optimizer=True), 4),
    "tp2dp2sp": (TP2_DP2_SP, 4),
    "pp2vpp2dp2": (PP2_VPP2_DP2, 4),
    "pp2_uneven_plain": (ParallelConfig(pipeline=2, layout="1,3"), 2),
    "one_process": (ParallelConfig(), 1),
}


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by name."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit, names too."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def at(run: Path, step: int) -> str:
    """The path of a run's checkpoint."""
    return str(run / "checkpoints" / f"step_{step:08d}")


def names_in(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Six steps at tensor 2 x pipeline 2, saved in the background after 3 and 6; the run and each rank's answer."""
    run = tmp_path_factory.mktemp("uninterrupted")
    return run, world.run(train, Plan(parallel=TP2_PP2, run=str(run), save_at=(3, 6)))


@pytest.mark.parametrize("case", SAME_LAYOUT)
def test_resumed_equals_uninterrupted(world: World, tmp_path: Path, case: str) -> None:
    plan, ranks = SAME_LAYOUT[case]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = world.run(train, replace(plan, run=str(whole), save_at=(3, 6)), ranks=ranks)
    plan = replace(plan, load=at(whole, 3), run=str(resumed), save_at=(6,))
    answers = world.run(train, plan, ranks=ranks)
    for answer, reference in zip(answers, expected, strict=True):
        assert answer["problems"] == reference["problems"] == []
        assert answer["losses"] == reference["losses"][3:]
        assert answer["norms"] == reference["norms"][3:]
        assert answer["draws"][0] == reference["draws"][0]  # what each generator draws after the save, after the load
        assert answer["loaded"].same_layout
        assert answer["loaded"].extra == {"rows": 3 * ROWS}
    last, reference_last = tensors(Path(at(resumed, 6))), tensors(Path(at(whole, 6)))
    del last["random_state"], reference_last["random_state"]  # draws above
    assert_equal(last, reference_last)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in last)
    if plan.dtype is torch.float32:
        layout_free(last)  # weights are current although the optimizer's copies are gathered late


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_resumed_under_another_layout(
    world: World, uninterrupted: tuple[Path, list[dict]], tmp_path: Path, layout: str
) -> None:
    whole, (expected, *_) = uninterrupted
    parallel, ranks = OTHER_LAYOUTS[layout]
    plan = Plan(parallel=parallel, load=at(whole, 3), run=str(tmp_path), save_at=(3,))
    first, *others = world.run(train, plan, ranks=ranks)
    assert not first["loaded"].same_layout
    assert first["losses"] == pytest.approx(expected["losses"][3:], rel=1e-5)
    assert first["norms"] == pytest.approx(expected["norms"][3:], rel=1e-5)
    assert all(other["draws"] == first["draws"] for other in others)  # seeded anew, alike
    assert_equal(layout_free(tensors(Path(at(tmp_path, 3)))), layout_free(tensors(Path(at(whole, 3)))))


def layout_free(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without random states, and without the distributed optimizer's copies of parameters, which must equal them."""
    master = "optimizer.state.param."
    for name in [name for name in state if name.startswith(master)]:
        assert torch.equal(state[name], state[name.removeprefix(master)]), name
    return {name: value for name, value in state.items() if name != "random_state" and not name.startswith(master)}


def test_data_parallel_size_shrinks_and_grows(
    world: World, uninterrupted: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    """DP2, sharded -> DP1, plain -> tensor 2 x pipeline 2 -> DP4, sharded; each resumes from the run folder."""
    _, (expected, *_) = uninterrupted
    run = str(tmp_path)
    losses = []
    for parallel, ranks, until in ((DP2_SHARDED, 2, 2), (DP2, 1, 4), (TP2_PP2, 4, 5), (DP2_SHARDED, 4, 6)):
        plan = Plan(parallel=parallel, load=run if losses else "", run=run, steps=until, save_at=(until,))
        losses += world.run(train, plan, ranks=ranks)[0]["losses"]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)


def test_a_stage_starts_from_the_stage_before(world: World, tmp_path: Path) -> None:
    """Stage 1 -> 2 -> 3 under three layouts: weights pass on unchanged, frozen ones too, and moments are new."""
    runs = [tmp_path / name for name in ("stage1", "stage2", "stage3")]
    layouts = ((TP2_PP2, 4), (DP2_SHARDED, 2), (PP2_VPP2_DP2, 4))
    seen: list[dict[str, Tensor]] = []
    for index, (parallel, ranks) in enumerate(layouts):
        start = str(runs[index - 1]) if index else ""
        plan = Plan(parallel=parallel, stage=index + 1, load_model=start, run=str(runs[index]), steps=2, save_at=(0, 2))
        assert world.run(train, plan, ranks=ranks)[0]["problems"] == []
        seen += [tensors(Path(at(runs[index], step))) for step in (0, 2)]
    weights = [{n: t for n, t in state.items() if not n.startswith(("optimizer.", "random"))} for state in seen]
    assert_equal(weights[1], weights[2])
    assert_equal(weights[3], weights[4])
    for index, trained in enumerate(
        (
            ("first_stage.adaptor.", "first_stage.towers.sam.downsamples."),
            ("first_stage.adaptor.", "decoder.", "last_stage."),
            ("first_stage.adaptor.", "decoder.", "first_stage.towers.siglip."),
        )
    ):
        before, after = weights[2 * index], weights[2 * index + 1]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(any(name.startswith(prefix) for name in moved) for prefix in trained)
        moments = {n.removeprefix("optimizer.state.exp_avg.") for n in seen[2 * index] if ".exp_avg." in n}
        assert moved <= moments < before.keys()
        assert not any(seen[2 * index][f"optimizer.state.exp_avg.{name}"].any() for name in moments)


def test_background_and_foreground_saves_are_equal(
    world: World, uninterrupted: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    """Training goes on while the background save is written: it must hold the state of its step."""
    plan = Plan(parallel=TP2_PP2, run=str(tmp_path), steps=3, save_at=(3,), background=False)
    assert world.run(train, plan)[0]["problems"] == []
    assert_equal(tensors(Path(at(tmp_path, 3))), tensors(Path(at(uninterrupted[0], 3))))


def test_only_the_newest_are_kept(world: World, tmp_path: Path) -> None:
    """With what they hand on, which came with a checkpoint of other tensors."""
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    (start / "metadata.json").write_text("{}")
    save_file({"attn_pool.latent": torch.arange(6.0)}, start / "unused.safetensors")
    plan = Plan(parallel=DP2, init_from=str(start), run=str(run), steps=4, save_at=(1, 2, 3, 4), keep=2)
    assert [answer["problems"] for answer in world.run(train, plan, ranks=2)] == [[], []]
    assert names_in(run) == ["carried", "latest", "step_00000003", "step_00000004"]
    for step in (3, 4):
        handed_on = Path(at(run, step), "unused.safetensors")
        assert handed_on.read_bytes() == (start / "unused.safetensors").read_bytes()
    (start / "unused.safetensors").write_bytes(b"torn")
    refused = world.run(refusal, replace(plan, run=str(tmp_path / "other")), ranks=2)
    assert len(set(refused)) == 1
    assert "a header of 4 bytes in a file of 4" in refused[0]


FULL_DISK = {
    "writer_of_rank_1": {"full_disk": {1: 3000}},
    "writer_of_rank_1_in_the_foreground": {"full_disk": {1: 3000}, "background": False},
    "small_files_of_rank_0": {"full_disk": {0: 1000}},
    "index_on_rank_0": {"sabotage": fill_disk_of_rank_zero},
}


@pytest.mark.parametrize("case", FULL_DISK)
def test_a_full_disk_is_everyones_error(world: World, tmp_path: Path, case: str) -> None:
    plan = Plan(parallel=ParallelConfig(pipeline=2), run=str(tmp_path), steps=1, save_at=(1,))
    world.run(train, plan, ranks=2)
    plan = replace(plan, load=str(tmp_path), steps=3, save_at=(2,), **FULL_DISK[case])
    answers = world.run(train, plan, ranks=2)
    assert answers[0]["problems"] == answers[1]["problems"]
    (problem,) = answers[0]["problems"]
    assert "File too large" in problem
    assert str(tmp_path) in problem
    assert names_in(tmp_path) == ["latest", "step_00000001"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"


def test_too_little_space_is_known_before_writing(world: World, tmp_path: Path) -> None:
    plan = Plan(parallel=ParallelConfig(), run=str(tmp_path), steps=0, save_at=(0,), free_bytes=1000)
    (problem,) = world.run(train, plan, ranks=1)[0]["problems"]
    assert "bytes, the disk has 1,000 free" in problem
    assert names_in(tmp_path) == []


def test_a_killed_writer_is_everyones_error(world: World, tmp_path: Path) -> None:
    plan = Plan(
        parallel=ParallelConfig(pipeline=2),
        run=str(tmp_path),
        steps=1,
        save_at=(1,),
        stuck=1,
        sabotage=kill_writer_of_rank_one,
    )
    answers = world.run(train, plan, ranks=2)
    for answer in answers:
        assert "killed (rank 1)" in answer["problems"][0]
    assert names_in(tmp_path) == []


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 of every trainer while background writers are at work: the checkpoint before stays the newest."""
    plan = Plan(parallel=ParallelConfig(pipeline=2), run=str(tmp_path), steps=9, save_at=(1, 2))
    with World(2) as world:
        with pytest.raises(WorldError, match="the process died"):
            world.run(train_and_die, plan)
        assert find_newest(tmp_path) == Path(at(tmp_path, 1))
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"
        assert len(list((tmp_path / "checkpoints").glob("incomplete_00000002_*"))) == 1
        wait_for_orphans(tmp_path)  # or they write on while the next start cleans up
        answers = world.run(train, replace(plan, load=str(tmp_path), steps=2, save_at=(2,)))
    assert answers[0]["loaded"].step == 1
    assert answers[0]["problems"] == []
    assert names_in(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_what_does_not_fit_is_refused(world: World, uninterrupted: tuple[Path, list[dict]]) -> None:
    """On every rank, in one sentence, with names and both numbers."""
    saved = str(uninterrupted[0])
    plan = Plan(parallel=TP2_PP2, load=saved)
    wider = replace(MODEL, decoder=replace(MODEL.decoder, vocab=64))
    deeper = replace(MODEL, decoder=replace(MODEL.decoder, layers=6))
    for change, expected in (
        ({"model": wider}, "(32, 16) there and (64, 16) in this model"),
        ({"model": wider, "load": "", "load_model": saved}, "(32, 16) there and (64, 16) in this model"),
        ({"model": deeper}, "no tensor decoder.layers.4"),
        ({"tokenizer": "b" * 64}, "trained with tokenizer aaaaaaaaaaaa, the run's tokenizer is bbbbbbbbbbbb"),
        ({"load": f"{saved}/nowhere"}, "no such folder"),
    ):
        answers = world.run(refusal, replace(plan, **change))
        assert len(set(answers)) == 1
        assert expected in answers[0]
        assert saved in answers[0]


def test_a_stage_that_trains_other_parts_is_refused(
    world: World, uninterrupted: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    plan = Plan(parallel=DP2, stage=2, run=str(tmp_path), steps=1, save_at=(1,))
    world.run(train, plan, ranks=1)
    (answer,) = world.run(refusal, Plan(parallel=DP2, stage=3, load=str(tmp_path)), ranks=1)
    assert "was frozen when this was saved" in answer


class _Command:
    """Unpickled, this runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_of_a_checkpoint_is_run(uninterrupted: tuple[Path, list[dict]], tmp_path: Path) -> None:
    folder, proof = tmp_path / "checkpoint", tmp_path / "proof"
    shutil.copytree(at(uninterrupted[0], 3), folder)
    assert read_index(folder)["last_stage.head.weight"] == (32, 16)
    (folder / ".metadata").write_bytes(pickle.dumps(_Command(f"touch {proof}")))
    with pytest.raises(CheckpointError, match=r"refused \(it refers to posix\.system\)"):
        read_index(folder)
    assert not proof.exists()
    (folder / ".metadata").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="refused"):
        read_index(folder)
