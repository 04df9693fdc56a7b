"""Files of `torch.save` read lazily, against `torch.load`; what a file may not contain is refused by name."""

import argparse
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.torch_file import read_torch_file
from megavl.checkpoint.folder import CheckpointError


def plain(value: Any) -> Any:
    """The object with values read, row by row where there are rows."""
    if isinstance(value, LazyTensor):
        assert value.nbytes == value.read().nbytes
        pieces = [value.read(row, row + 1) for row in range(value.num_rows)]
        read = torch.cat(pieces) if value.shape and pieces else value.read()
        assert read.is_contiguous()
        return read.view(value.shape)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


def test_as_torch_reads_it(tmp_path: Path) -> None:
    """Views of one storage, strides, empty and zero-dimensional tensors, nested containers and plain values."""
    base = torch.randn(6, 5, 4)
    content = {
        "whole": base,
        "rows": base[2:4],
        "transposed": base.permute(2, 0, 1),
        "column": base[:, 1, ::2],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "bf16": torch.nn.Parameter(torch.randn(3, 2).bfloat16()),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "state": OrderedDict(step=3, lists=[torch.arange(3), (1, "text", None)]),
        4: True,
    }
    torch.save(content, tmp_path / "file.pt")
    assert_same(plain(read_torch_file(tmp_path / "file.pt")), torch.load(tmp_path / "file.pt", weights_only=True))


def test_a_rezipped_file_is_read_at_its_true_offsets_or_refused(tmp_path: Path) -> None:
    """Another zip tool aligns differently; reading where torch would have put the values gives wrong ones."""
    torch.save({"a": torch.arange(8.0), "b": torch.arange(5)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as old, zipfile.ZipFile(tmp_path / "moved.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    try:
        read = plain(read_torch_file(tmp_path / "moved.pt"))
    except CheckpointError as error:
        assert "are stored" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert_same(read, torch.load(tmp_path / "file.pt"))


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Harmful()}, r"file\.pt: refused, it asks for posix\.system"),
        ({"args": argparse.Namespace(a=1)}, r"file\.pt: refused, it asks for argparse\.Namespace"),
        ({"s": torch.eye(2).to_sparse()}, r"file\.pt: s: a tensor of layout torch\.sparse_coo"),
    ],
)
def test_refused_objects(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(tmp_path / "file.pt")
    assert not (tmp_path / "harmed").exists()


def test_allowed_records(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1), "t": torch.ones(2)}, tmp_path / "file.pt")
    content = read_torch_file(tmp_path / "file.pt", allowed=[argparse.Namespace])
    assert content["args"].a == 1
    assert torch.equal(content["t"].read(), torch.ones(2))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(CheckpointError, match=r"file\.pt: truncated"):
        read_torch_file(path)
    path.write_bytes(whole)
    tensor = read_torch_file(path)["a"]
    path.write_bytes(whole[:800])
    with pytest.raises(CheckpointError, match=r"file\.pt: ends after 800 bytes"):
        tensor.read()
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"file\.pt: truncated, or not a zip file of torch\.save"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match=r"absent\.pt: cannot be read \(No such file"):
        read_torch_file(tmp_path / "absent.pt")
