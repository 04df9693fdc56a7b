"""The command itself, sound and with planted faults: each is found, named and turned into an exit code."""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from world import World

from megavl.checkpoint import reader
from megavl.model.last_stage import LastStage
from megavl.model.stage import Stage
from megavl.parallel import gradients
from megavl.parallel.groups import init_groups
from megavl.training import parity
from megavl.training.reference_steps import run_reference, shift_labels

RECIPE = """
from dataclasses import replace
from layouts import MODEL
from megavl.config import *

def recipe():
    source = SourceConfig(name="made up", path="none", modality="language", share=1.0)
    return Recipe(
        run_dir="none", model=MODEL, parallel=ParallelConfig(device="cpu"),
        data=DataConfig(tokenizer="none", sources=(source,), seq_length=64),
        stage=StageConfig(number=3, steps=1, global_batch=8, dtype="fp32"),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0),
    )
"""

MICRO_BATCHES = 4
"""Half of what the command takes, in half its time: two for each data-parallel rank of two."""

Plant = Callable[[], tuple[Any, str, Any]]
"""Makes the owner, name and value of an attribute that is faulty."""


def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "verify_layouts.py"
    spec = importlib.util.spec_from_file_location("verify_layouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(recipe: str, path: str) -> None:
    """In a world of one: what the command computes alone before it looks at layouts."""
    from megavl.recipe import parse_command_line

    settings = parse_command_line([recipe])
    torch.save(run_reference(tool().question(settings, MICRO_BATCHES), init_groups(settings.parallel)), path)


def verify(recipe: str, path: str, layouts: str, plant: Plant | None) -> tuple[int, str]:
    """On every rank: run the command with the kept reference; (exit code, what it printed)."""
    command = tool()
    command._reference = lambda *_: torch.load(path, weights_only=False)
    sound = command.question
    command.question = lambda settings, _: sound(settings, MICRO_BATCHES)
    os.environ.update(RANK=str(torch.distributed.get_rank()), WORLD_SIZE=str(torch.distributed.get_world_size()))
    printed = io.StringIO()
    with planted(plant), contextlib.redirect_stdout(printed):
        code = command.main([recipe, "--layouts", layouts])
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return code, printed.getvalue()


@contextlib.contextmanager
def planted(plant: Plant | None) -> Iterator[None]:
    if plant is None:
        yield
        return
    owner, name, fault = plant()
    sound = getattr(owner, name)
    setattr(owner, name, fault)
    try:
        yield
    finally:
        setattr(owner, name, sound)


def doubled_vision() -> tuple[Any, str, Any]:
    """Gradients of towers and adaptor summed over the tensor group, on whose ranks they are whole."""

    def mark(stage: Stage) -> None:
        for name, parameter in stage.named_parameters():
            if stage.component_of(name) in gradients.REPLICATED_COMPONENTS:
                parameter.sequence_parallel = True

    return gradients, "_mark_replicated", mark


def missing_tensor_sum() -> tuple[Any, str, Any]:
    """Norms that each saw a part of the sequence, not summed over the tensor group."""
    sound = gradients._mark_replicated

    def mark(stage: Stage) -> None:
        sound(stage)
        for parameter in stage.parameters():
            parameter.sequence_parallel = False

    return gradients, "_mark_replicated", mark


def missing_data_sum() -> tuple[Any, str, Any]:
    """No reduction over data-parallel copies."""
    return gradients.DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None


def shifted_label() -> tuple[Any, str, Any]:
    """Labels one position too early: the model learns to repeat its input."""
    sound = LastStage.forward
    return LastStage, "forward", lambda self, hidden, labels, _: sound(self, hidden, shift_labels(labels, -1))


def swapped_order() -> tuple[Any, str, Any]:
    """Each pipeline rank runs its first two layers in the wrong order."""
    sound = parity.build_frozen

    def build(*args: Any) -> list[Stage]:
        stages = sound(*args)
        for stage in stages:
            stage.decoder.layers[0], stage.decoder.layers[1] = stage.decoder.layers[1], stage.decoder.layers[0]
        return stages

    return parity, "build_frozen", build


def swapped_weights() -> tuple[Any, str, Any]:
    """Layer 2 starts with the weights of layer 3 and the reverse."""
    sound = parity.build_frozen

    def build(*args: Any) -> list[Stage]:
        stages = sound(*args)
        layers = stages[-1].decoder.layers
        for one, other in zip(layers[-2].parameters(), layers[-1].parameters(), strict=True):
            one.data, other.data = other.data, one.data
        return stages

    return parity, "build_frozen", build


def forgotten_moments() -> tuple[Any, str, Any]:
    """A resumed run that starts with fresh Adam moments."""
    return reader, "load_optimizer_state", lambda *_, **__: None


@pytest.fixture(scope="module")
def kept(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Recipe file and reference file."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "recipe.py").write_text(RECIPE)
    paths = str(folder / "recipe.py"), str(folder / "reference.pt")
    world.run(reference, *paths, ranks=1)
    return paths


def test_sound_layouts_pass_and_resume_under_each_other(world: World, kept: tuple[str, str]) -> None:
    answers = world.run(verify, *kept, "tp2pp2sp,tp2dist,pp2vpp2", None)
    assert [code for code, _ in answers] == [0, 0, 0, 0]
    lines = answers[0][1].splitlines()
    assert lines[0].split() == ["text", "image", "mixed", "packed", "resume"]
    assert [len(line.split()) for line in lines[1:4]] == [6, 6, 6]
    assert lines[4] == "all within 1e-05"


FAULTS: dict[str, tuple[str, int, Plant, list[str]]] = {
    "doubled vision gradient": (
        "tp2sp",
        2,
        doubled_vision,
        [
            "tp2sp: step 2: gradient of first_stage.towers.",
            "gradients of aligner, sam_adaptor, siglip are 2 times the reference (the size of the tensor group)",
        ],
    ),
    "missing sum over the tensor group": (
        "tp2sp",
        2,
        missing_tensor_sum,
        [
            "tp2sp: step 1: gradient of decoder.layers.0.input_layernorm.weight",
            "gradients of decoder are partial: the sum over the tensor group (2 ranks) is missing",
            "have copies that differ over the tensor group",
        ],
    ),
    "missing sum over data-parallel copies": (
        "tp1",
        2,
        missing_data_sum,
        ["are partial: the sum over the data-parallel group (2 ranks) is missing"],
    ),
    "shifted label": (
        "pp2",
        2,
        shifted_label,
        ["step 1: gradient of", "the labels are shifted by one position to the left"],
    ),
    "layers in the wrong order": (
        "pp2",
        2,
        swapped_order,
        ["the decoder layers run in the order 1,0,3,2"],
    ),
    "swapped weights": (
        "tp2",
        2,
        swapped_weights,
        ["decoder.layers.2 has the weights of decoder.layers.3, decoder.layers.3 has the weights of decoder.layers.2"],
    ),
    "forgotten moments": (
        "pp2",
        2,
        forgotten_moments,
        [
            "pp2 resumed under plain data parallelism: step 4: parameter of",
            "loss, gradients and norm agree, the update does not",
        ],
    ),
}
"""Fault -> layout, ranks, how to plant it, and what must be printed."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(world: World, kept: tuple[str, str], fault: str) -> None:
    layout, ranks, plant, expected = FAULTS[fault]
    answers = world.run(verify, *kept, layout, plant, ranks=ranks)
    assert [code for code, _ in answers] == [1] * ranks
    for sentence in expected:
        assert sentence in answers[0][1], answers[0][1]


def test_a_layout_that_does_not_fit_is_refused(world: World, kept: tuple[str, str]) -> None:
    assert world.run(verify, *kept, "tp3", None, ranks=2) == [(1, ""), (1, "")]
    assert sys.modules.get("verify_layouts") is None
