"""Let megatron-core run on the CPU: one explicit redirection of the CUDA it names in its source.

In: nothing. Out: a process in which megatron-core's "the current CUDA device" is the CPU. megatron-core 0.16.1 computes
on any device, but its source names CUDA in four ways, and each is redirected here, once per process:

1. `torch.cuda.current_device()` and its kin: replaced in `torch.cuda` (`_CUDA_FUNCTIONS`).
2. `torch.zeros(..., device="cuda")`: in the modules that do this the name `torch` becomes a view of torch whose
   factories read "cuda" as "cpu" (`_FACTORY_MODULES`). A torch-wide function mode would do as well, but costs every
   operator of the model a Python call.
3. type strings such as `"torch.cuda.FloatTensor"`, and `Tensor.cuda()`: two methods of `torch.Tensor`.
4. the CUDA generator: the CPU's default generator plays its part.

Never entered when CUDA is used; `parallel/groups.py` enters it for `device = "cpu"` and says so in the log.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")

_FACTORY_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
"""Modules whose factory calls name the device "cuda"."""

_FACTORIES = ("zeros", "tensor", "empty", "empty_like")
"""The factories they call so."""

_entered = False


def enter_cpu_mode() -> None:
    """Redirect megatron-core's CUDA to the CPU for the rest of this process; a second call does nothing.

    Raises:
        RuntimeError: CUDA is already in use in this process, so the redirection would mix two devices.
    """
    global _entered
    if _entered:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CPU mode was asked for, but this process already uses CUDA")
    for name, function in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    for name in _FACTORY_MODULES:
        importlib.import_module(name).torch = _TorchOnCpu()  # type: ignore[attr-defined]
    torch.Tensor.type = _type_as_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _get_generator_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_generator_state  # type: ignore[attr-defined]
    _entered = True
    logging.getLogger(__name__).info("CPU mode: megatron-core's CUDA calls go to the CPU, collectives to gloo")


class _TorchOnCpu(ModuleType):
    """torch as `_FACTORY_MODULES` see it: `device="cuda"` in a factory means the CPU, everything else is torch's."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`factory` with `device="cuda"` read as the CPU."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


_tensor_type = torch.Tensor.type


def _type_as_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()` that reports `torch.cuda.FloatTensor`; as a conversion (with arguments) it is torch's own."""
    result = _tensor_type(self, *args, **kwargs)
    if isinstance(result, str):
        return result.replace("torch.", "torch.cuda.", 1)
    return result


def _get_generator_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    """megatron-core's `_get_cuda_rng_state`, from the CPU generator (whose state is always a copy)."""
    return torch.get_rng_state()


def _set_generator_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """megatron-core's `_set_cuda_rng_state`, to the CPU generator."""
    torch.set_rng_state(new_state)


_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: _CPU,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "get_rng_state": _get_generator_state,
    "set_rng_state": _set_generator_state,
}
"""Functions of `torch.cuda` that megatron-core calls whatever the device."""
