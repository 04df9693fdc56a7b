"""What runs ahead on a stream of its own, on stand-ins for streams: who waits for whom, and whose memory is whose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megavl.config import ParallelConfig
from megavl.model.build import build_stages
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.parallel.side_stream import SideStream
from megavl.parallel.vision_ahead import AheadEncoder, make_ahead_encoder
from megavl.training.freeze import frozen_components
from megavl.training.synthetic_batches import global_batch, share

happened: list[str] = []
"""What happened, in the order in which the host asked for it, and on which stream."""


class Stream:
    """A stand-in for a CUDA stream."""

    current: "Stream"

    def __init__(self, device: Any, name: str = "side") -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: "Stream") -> None:
        happened.append(f"{self.name} waits for {other.name}")


@contextmanager
def inside(stream: Stream) -> Iterator[None]:
    """torch.cuda.stream."""
    Stream.current, before = stream, Stream.current
    yield
    Stream.current = before


def told(what: str, function: Any) -> Any:
    """`function`, logged with the stream that its work goes to."""

    def logged(*args: Any, **kwargs: Any) -> Any:
        happened.append(f"{what} on {Stream.current.name}")
        return function(*args, **kwargs)

    return logged


@contextmanager
def marked() -> Iterator[None]:
    happened.append(f"mark on {Stream.current.name}")
    yield
    happened.append(f"mark on {Stream.current.name}")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(storage, stream) of tensors that a stream was told to use; streams are stand-ins meanwhile."""
    happened.clear()
    Stream.current = Stream(None, "main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    found: list[tuple[int, str]] = []

    def record(tensor: Tensor, stream: Stream) -> None:
        happened.append("recorded")
        found.append((tensor.untyped_storage().data_ptr(), stream.name))

    monkeypatch.setattr(Tensor, "record_stream", record)
    return found


def test_order_of_streams(recorded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, then encoding on the side stream alone; the main one waits for it before it reads what was made."""
    model, parallel = SIZES["tiny_hybrid"], ParallelConfig(device="cpu", vision="split_model", vision_batch=4)
    groups = init_groups(parallel)
    try:
        stages = build_stages(model, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
        encoder = make_ahead_encoder(stages, model, parallel, groups, frozen=frozen_components(2))
    finally:
        destroy_groups()
    assert encoder is not None
    encoder.side = SideStream(torch.device("cuda"))
    assert happened == ["side waits for main"]
    monkeypatch.setattr(torch, "empty", told("allocate", torch.empty))
    monkeypatch.setattr(encoder.towers, "encode_frozen", told("encode", encoder.towers.encode_frozen))
    monkeypatch.setattr(AheadEncoder, "_gather", told("gather", AheadEncoder._gather))
    batches = share(global_batch(model, "image", micro_batches=3), 0, 1)  # 6 images, two passes

    encoder.begin(batches, marked())
    made = ["allocate on side"] * 3 + ["encode on side"] * 2  # neck, branch, SigLIP
    assert happened[1:] == ["mark on side", *made, "mark on side"]
    happened.clear()
    taken = encoder(batches)
    assert happened == ["main waits for side", *["recorded"] * 3, "gather on main"]
    storages = {of.untyped_storage().data_ptr() for batch in taken for of in (batch.encoded or {}).values()}
    assert {(storage, "main") for storage in storages} == set(recorded)

    happened.clear()
    encoder(batches)  # nothing was begun: the same way, at once
    assert happened == [*made, "main waits for side", *["recorded"] * 3, "gather on main"]
