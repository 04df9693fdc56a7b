"""Which implementation each operator gets, what is refused, and what start-up says."""

import sys
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

from megavl.config import KernelsConfig
from megavl.ops import FUNCTIONS, NOT_BY_DEFAULT, PLAIN, Ops, choose, make_ops, operator_lines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = tuple(field.name for field in fields(KernelsConfig))


def all_of(value: str) -> KernelsConfig:
    return KernelsConfig(**dict.fromkeys(NAMES, value))


def implementations(kernels: KernelsConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    return {name: choice.implementation for name, choice in choose(kernels, device, dtype).items()}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As started without TRITON_INTERPRET."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["megavl.kernels", "triton"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine on which a package cannot be imported."""
    package = request.param
    for name in list(sys.modules):
        if name.startswith(("megavl.kernels", package)):
            monkeypatch.delitem(sys.modules, name)

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[: package.count(".") + 1] == package.split("."):
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.delattr("megavl.kernels", raising=False)
    yield package
    for name in list(sys.modules):  # what was half imported
        if name.startswith("megavl.kernels"):
            del sys.modules[name]


def test_every_operator_is_a_field_of_both() -> None:
    assert {field.name for field in fields(Ops)} == set(FUNCTIONS)
    assert {name for name, _ in FUNCTIONS.values()} == set(NAMES)
    assert set(NOT_BY_DEFAULT) <= set(NAMES)


@pytest.mark.usefixtures("compiling")
def test_auto() -> None:
    assert set(implementations(KernelsConfig(), CPU).values()) == {"reference"}
    on_cuda = implementations(KernelsConfig(), CUDA, torch.bfloat16)
    assert on_cuda == {name: "reference" if name in NOT_BY_DEFAULT else "triton" for name in NAMES}


@pytest.mark.usefixtures("interpreting")
def test_auto_stays_with_the_reference_on_cpu_also_when_interpreting() -> None:
    assert make_ops(KernelsConfig(), CPU, torch.float32) == PLAIN


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_reference_is_no_operator(device: torch.device) -> None:
    assert make_ops(all_of("reference"), device, torch.bfloat16) == PLAIN
    assert all(getattr(PLAIN, name) is None for name in FUNCTIONS)


@pytest.mark.usefixtures("interpreting")
def test_triton_on_cpu_in_the_interpreter() -> None:
    ops = make_ops(all_of("triton"), CPU, torch.float32)
    loaded = {field: getattr(ops, field) for field in FUNCTIONS}
    places = {f: (op.__module__.split(".")[-2], op.__name__) for f, op in loaded.items()}
    assert places == FUNCTIONS
    with pytest.raises(ValueError, match="bf16, which Triton's interpreter computes wrongly"):
        make_ops(all_of("triton"), CPU, torch.bfloat16)


@pytest.mark.usefixtures("compiling")
def test_triton_on_cpu_is_one_sentence_that_names_the_fields() -> None:
    kernels = KernelsConfig(rope="triton", swiglu="triton")
    with pytest.raises(ValueError, match=r"^kernels.swiglu, kernels.rope: triton is asked for"):
        choose(kernels, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"device is cpu and Triton needs CUDA .*TRITON_INTERPRET=1"):
        choose(kernels, CPU, torch.float32)


@pytest.mark.usefixtures("compiling")
def test_without_the_kernels(without: str) -> None:
    """`auto` takes the reference and says so, `triton` is an error."""
    assert set(implementations(KernelsConfig(), CUDA).values()) == {"reference"}
    assert f"auto: the package {without} is missing" in "\n".join(operator_lines(KernelsConfig(), CUDA, torch.float32))
    with pytest.raises(ValueError, match=f"kernels.rope: triton is asked for, but the package {without} is missing"):
        choose(KernelsConfig(rope="triton"), CUDA, torch.float32)
    assert make_ops(all_of("reference"), CUDA, torch.float32) == PLAIN


def test_a_broken_kernel_is_not_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a missing package makes `auto` fall back."""

    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'misspelt'", name="misspelt")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("megavl.ops.importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="misspelt"):
        choose(KernelsConfig(), CUDA, torch.float32)


@pytest.mark.usefixtures("interpreting")
def test_a_line_per_operator() -> None:
    kernels = replace(KernelsConfig(), rope="triton", rmsnorm="reference")
    heading, *lines = operator_lines(kernels, CPU, torch.float32)
    assert [line.split()[0] for line in lines] == list(NAMES)
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert told["rope"] == "triton the recipe asks for it, in Triton's interpreter"
    assert told["rmsnorm"] == "reference the recipe asks for it"
    assert told["swiglu"] == "reference auto: kernels are for CUDA"
    assert heading.split() == ["operator", "runs", "because"]
