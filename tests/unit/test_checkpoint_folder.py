"""The folder of checkpoints: complete or absent, `latest` right, nothing deleted that is needed."""

from pathlib import Path

import pytest

from megavl.checkpoint import folder
from megavl.checkpoint.folder import CheckpointError


def save(checkpoints: Path, step: int) -> Path:
    """What a writer does, with one file of content."""
    started = folder.start_checkpoint(checkpoints, step)
    (started / "__0_0.distcp").write_bytes(b"x")
    folder.write_state(started, {"step": step})
    return folder.complete_checkpoint(started, step)


def latest(checkpoints: Path) -> str:
    return (checkpoints / "latest").read_text().strip()


def test_complete_and_latest(tmp_path: Path) -> None:
    assert folder.find_newest(tmp_path) is None
    for step in (5, 100_000_000, 20):  # nine digits sort after eight, and saving order does not matter
        saved = save(tmp_path, step)
        assert saved.name == f"step_{step:08d}"
        assert latest(tmp_path) == saved.name
    assert [step for step, _ in folder.list_complete(tmp_path)] == [5, 20, 100_000_000]
    assert folder.find_newest(tmp_path).name == "step_100000000"
    assert folder.read_state(saved) == {"step": 20}


def test_a_folder_being_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    started = folder.start_checkpoint(tmp_path, 10)
    assert folder.find_newest(tmp_path).name == "step_00000005"
    (started / "metadata.json").write_text("{}")  # even with the marker: the name says that it is not renamed yet
    assert folder.find_newest(tmp_path).name == "step_00000005"
    assert latest(tmp_path) == "step_00000005"
    assert folder.start_checkpoint(tmp_path, 10) != started


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000007"])
def test_every_path_a_user_gives(tmp_path: Path, where: str) -> None:
    save(tmp_path / "checkpoints", 3)
    newest = save(tmp_path / "checkpoints", 7)
    assert folder.find_checkpoint(tmp_path / where) == newest


def test_bad_paths_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        folder.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in it \(0 incomplete\)"):
        folder.find_checkpoint(tmp_path)
    started = folder.start_checkpoint(tmp_path / "checkpoints", 3)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in it \(1 incomplete\)"):
        folder.find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="incomplete"):
        folder.find_checkpoint(started)
    torn = tmp_path / "checkpoints" / "step_00000009"  # a marker cut off by a full disk, as megatron-core writes it
    torn.mkdir()
    (torn / "metadata.json").write_text("")
    with pytest.raises(CheckpointError, match="incomplete"):
        folder.find_checkpoint(torn)


def test_state_file_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no state\.json"):
        folder.read_state(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        folder.read_state(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(2, [30, 40]), (1, [40]), (0, [40]), (9, [10, 20, 30, 40])])
def test_keep_last(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    folder.start_checkpoint(tmp_path, 50)  # not counted, not touched
    folder.remove_old(tmp_path, keep)
    assert [step for step, _ in folder.list_complete(tmp_path)] == left
    assert latest(tmp_path) == "step_00000040"
    assert len(list(tmp_path.glob("incomplete_*"))) == 1
    assert not list(tmp_path.glob("removed_*"))


def test_a_crash_while_removing_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *_, **__: None)  # killed before the first file was removed
    folder.remove_old(tmp_path, 1)
    assert [step for step, _ in folder.list_complete(tmp_path)] == [20]
    monkeypatch.undo()
    assert [entry.name[:16] for entry in folder.remove_leftovers(tmp_path)] == ["removed_00000010"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000020"]


def test_start_cleans_up_and_mends_latest(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "latest").write_text("step_00000010\n")  # killed between the rename and `latest`
    folder.start_checkpoint(tmp_path, 30)
    (tmp_path / "step_00000031").mkdir()
    (tmp_path / "notes").mkdir()  # not ours
    assert len(folder.remove_leftovers(tmp_path)) == 2
    assert latest(tmp_path) == "step_00000020"
    assert sorted(e.name for e in tmp_path.iterdir()) == ["latest", "notes", "step_00000010", "step_00000020"]


@pytest.mark.parametrize("refused", ["metadata.json", "rename", "latest"])
def test_a_full_disk_at_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    save(tmp_path, 10)
    started = folder.start_checkpoint(tmp_path, 20)
    replace, rename = Path.replace, Path.rename

    def full(path: Path, target: Path) -> Path:
        if refused in (Path(target).name, "rename" if path == started else ""):
            raise OSError(28, "No space left on device")
        return (replace if path.name.startswith(".") else rename)(path, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        folder.complete_checkpoint(started, 20)
    assert latest(tmp_path) == "step_00000010"
    assert folder.find_newest(tmp_path).name == ("step_00000020" if refused == "latest" else "step_00000010")
    assert not list(tmp_path.rglob(".*"))  # no drafts left


def test_space_is_checked_with_both_numbers(tmp_path: Path) -> None:
    folder.check_space(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000,000,000 bytes, the disk has [\d,]+ free"):
        folder.check_space(tmp_path, 10**18)


def test_a_description_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"state.json: a list, not the description of a checkpoint"):
        folder.read_state(tmp_path)
