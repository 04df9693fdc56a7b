"""The feature cache: what comes back equals what would be computed, whatever happened to the folder."""

import fcntl
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavl.data.feature_cache import FeatureCache

ROOMY = 2**30


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Counting:
    """Stands for the towers: features that tell images apart, and how many were computed."""

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        self.computed += len(pixels)
        return {"high": pixels.float().flatten(1) / 7, "low": pixels.bfloat16().mean((2, 3))}


def check(cache: FeatureCache, pixels: Tensor) -> int:
    """Features of the cache are the towers'; returns how many the towers were asked for."""
    towers = Counting()
    features, expected = cache.encode(pixels, towers, torch.device("cpu")), Counting()(pixels)
    assert features.keys() == expected.keys()
    for kind in expected:
        assert features[kind].dtype == expected[kind].dtype
        assert torch.equal(features[kind], expected[kind])
    return towers.computed


def test_each_image_is_computed_once_also_across_objects(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, ROOMY, "weights")
    assert check(cache, images(5)) == 5
    assert check(cache, torch.cat([images(3, seed=1), images(5)])) == 3
    assert (cache.hits, cache.misses) == (5, 8)
    assert check(FeatureCache(tmp_path, ROOMY, "weights"), images(5)) == 0


def test_other_weights_or_pixels_never_meet(tmp_path: Path) -> None:
    assert check(FeatureCache(tmp_path, ROOMY, "weights"), images(2)) == 2
    assert check(FeatureCache(tmp_path, ROOMY, "other weights"), images(2)) == 2
    changed = images(2)
    changed[1, 2, 3, 3] ^= 1
    assert check(FeatureCache(tmp_path, ROOMY, "weights"), changed) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damage_is_found_and_computed_anew(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path, ROOMY, "weights")
    check(cache, images(1))
    (entry,) = (p for p in tmp_path.iterdir() if p.name != "lock")
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    assert check(cache, images(1)) == 1
    assert check(cache, images(1)) == 0


def test_what_was_not_used_for_longest_goes_first_and_the_limit_holds(tmp_path: Path) -> None:
    check(FeatureCache(tmp_path / "one", ROOMY, "weights"), images(1))
    size = sum(p.stat().st_size for p in (tmp_path / "one").iterdir() if p.name != "lock")
    cache = FeatureCache(tmp_path / "many", 10 * size, "weights")
    for seed in range(10):
        check(cache, images(1, seed))
    assert check(cache, images(1, seed=0)) == 0  # used now
    for seed in range(10, 40):
        check(cache, images(1, seed))
        assert sum(p.stat().st_size for p in cache.folder.iterdir() if p.name != "lock") <= cache.limit
        assert check(cache, images(1, seed=0)) == 0
    assert check(cache, images(1, seed=1)) == 1
    assert check(FeatureCache(tmp_path / "none", size - 1, "weights"), images(2)) == 2
    assert [p.name for p in (tmp_path / "none").iterdir()] == []


def fill(folder: Path, limit: int) -> None:
    cache = FeatureCache(folder, limit, "weights")
    for turn in range(40):
        check(cache, images(4, seed=turn % 7))


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    """Readers, writers and removers at once: the limit holds a third of the images."""
    check(FeatureCache(tmp_path / "one", ROOMY, "weights"), images(1))
    size = sum(p.stat().st_size for p in (tmp_path / "one").iterdir() if p.name != "lock")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path / "shared", 10 * size)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    entries = [p for p in (tmp_path / "shared").iterdir() if p.name != "lock"]
    assert sum(p.stat().st_size for p in entries) <= 10 * size
    assert not any("." in p.name for p in entries)


def test_bytes_are_counted_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Two that read the same count would write over each other's, and the folder would outgrow the limit."""
    with (tmp_path / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = multiprocessing.get_context("fork").Process(
            target=check, args=(FeatureCache(tmp_path, ROOMY, "weights"), images(1))
        )
        process.start()
        process.join(1)  # it waits for the lock; a slow machine only makes this pass
        assert process.is_alive()
        assert [p.name for p in tmp_path.iterdir()] == ["lock"]
        fcntl.flock(lock, fcntl.LOCK_UN)
        process.join(60)
    assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("lock", ["", "12x"])
def test_a_lost_count_is_made_anew(tmp_path: Path, lock: str) -> None:
    """A process may end between emptying the file and writing to it; counting from 0, the folder could grow twice."""
    cache = FeatureCache(tmp_path, ROOMY, "weights")
    check(cache, images(4))
    (tmp_path / "lock").write_text(lock)
    check(cache, images(1, seed=1))
    held = sum(p.stat().st_size for p in tmp_path.iterdir() if p.name != "lock")
    assert int((tmp_path / "lock").read_text()) == held


def test_a_folder_that_cannot_be_written_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path / "gone", ROOMY, "weights")
    monkeypatch.setattr(Path, "write_bytes", _no_space)
    assert check(cache, images(2)) == 2
    assert check(cache, images(2)) == 2
    assert [r.getMessage() for r in caplog.records] == ["parallel.vision_cache is not used any more: [Errno 28] full"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"parallel\.vision_cache .*file/below cannot be made"):
        FeatureCache(tmp_path / "file" / "below", ROOMY, "weights")


def _no_space(*_: object) -> None:
    raise OSError(28, "full")
