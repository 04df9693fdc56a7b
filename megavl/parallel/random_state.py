"""Random state of a rank: seeding, and a copy that a checkpoint can hold.

In: the recipe's seed. Out: seeded generators (Python, numpy, torch, megatron-core's tracker of generators that differ
over the tensor group), and their state as tensors and plain numbers, so that a checkpoint needs no pickle. Data order
does not depend on it: the batch of a step is a function of (recipe, seed, step).
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor

from megavl.parallel.groups import Groups


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed every generator of this rank.

    The default generators are equal on all ranks; the model-parallel one that megatron-core tracks differs over the
    tensor group, as partitioned weights need.

    Args:
        seed: the recipe's seed.
        groups: this rank's groups.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=groups.tensor_rank)


def capture_random_state() -> dict[str, Any]:
    """The state of every generator of this rank: tensors, numbers and strings only."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_version": version,
        "python_gauss": gauss,
        "numpy": torch.tensor(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [str(name), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `capture_random_state` returned.

    Args:
        state: the state of this rank. A CUDA state is ignored where CUDA is not used, and the reverse.
    """
    words: Tensor = state["python"]
    random.setstate((state["python_version"], tuple(words.tolist()), state["python_gauss"]))
    name, position, has_gauss, cached = state["numpy_rest"]
    np.random.set_state((name, state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
