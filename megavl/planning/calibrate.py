"""Time the parts of a model on the machine at hand and write what the planner reads.

In: sizes, and where to write. Out: a JSON file with work and seconds of every part, forward and backward, and with the
device, its type, date and versions. Work is what `megavl/training/flops.py` counts (`planning/costs.py` says in which
unit), so rates carry over to other freeze sets, lengths and tensor sizes.

What is timed: SigLIP, with the resizing of its input, and SAM with its adaptor on one image, the aligner,
the embedding, one decoder layer, the last norm with head and loss; all of it trained, and built with the kernels that
`auto` takes here.
Shapes: t tokens, h hidden, i images.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch
from torch import Tensor

from megavl.config import KernelsConfig, ModelConfig, ParallelConfig
from megavl.data.microbatch import MicroBatch
from megavl.model.attention import describe_documents
from megavl.model.build import build_stages
from megavl.model.stage import Stage
from megavl.ops import make_ops
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.training.flops import StepCounts, decoder_flops, image_flops
from megavl.training.freeze import COMPONENTS

REPEATS = 5
"""Timed runs of a part, after one that is not; the median counts."""
SAM_ADAPTOR = ("sam neck_hd", "sam convolutions", "sam_hd convolutions")
"""Terms of an image that belong to SAM's trained branch."""

Seconds = dict[str, float]
"""`forward` and `backward`."""
Timer = Callable[[Callable[[], Tensor]], Seconds]
"""A part's forward pass -> how long it takes."""


def calibrate(model: ModelConfig, path: Path, *, tokens: int, device: str = "auto") -> dict[str, Any]:
    """Time every part and write the file.

    Args:
        model: sizes; one layer of its decoder is built.
        path: JSON file to write.
        tokens: t, of the layer, the head and the embedding.
        device: `auto` takes CUDA where there is a device.

    Returns:
        What was written.
    """
    groups = init_groups(ParallelConfig(device=device))  # type: ignore[arg-type]
    written = time_parts(model, groups, tokens=tokens)
    destroy_groups()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2) + "\n")
    return written


def time_parts(
    model: ModelConfig, groups: Groups, *, tokens: int, layers: int = 1, images: int = 1, rest: float = 0.0
) -> dict[str, Any]:
    """What `calibrate` writes.

    Args:
        model: sizes.
        groups: those of a world without tensor and pipeline ranks; each rank times for itself.
        tokens: t, of the layers, the head and the embedding.
        layers: of the decoder, built and timed in a row.
        images: i, that towers and adaptor take at a time.
        rest: sleep so many times as long after each pass (`training/dilated_clock.py`).
    """
    cuda = groups.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    some = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, layers=layers))
    ops = make_ops(KernelsConfig(), groups.device, dtype)
    (stage,) = build_stages(some, ParallelConfig(), dtype=dtype, seed=1, pg=groups.pg, device=groups.device, ops=ops)
    timer = partial(time_part, device=groups.device, rest=rest)
    seconds = {**_vision_seconds(stage, dtype, timer, images), **_decoder_seconds(stage, tokens, dtype, timer)}
    single = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, layers=1))
    work = _work(single, tokens)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": cuda,
        "dtype": "bf16" if cuda else "fp32",
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "megatron": megatron.core.__version__},
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "parts": {name: {"work": work[name], "seconds": taken} for name, taken in seconds.items()},
    }


def _work(model: ModelConfig, tokens: int) -> dict[str, Seconds]:
    """Work of every part as it is timed: everything is trained but SAM's backbone."""
    trained = set(COMPONENTS) - {"sam"}
    image = {"forward": image_flops(model, (), padded_windows=True)}
    image["both"] = image_flops(model, trained, padded_windows=True)
    counts = StepCounts(images=0, tokens=tokens, squared_lengths=tokens**2, logits=tokens)
    decoder = {
        "forward": decoder_flops(model.decoder, counts, trained=False, passes=False),
        "both": decoder_flops(model.decoder, counts, trained=True, passes=True),
    }

    def split(terms: dict[str, dict[str, float]], *names: str) -> Seconds:
        forward, both = (sum(terms[d][n] for n in names if n in terms[d]) for d in ("forward", "both"))
        return {"forward": forward, "backward": both - forward}

    elements = float(tokens * model.decoder.hidden)
    whole_sam = split(image, "sam", "sam neck", *SAM_ADAPTOR)
    return {
        "siglip": split(image, "siglip"),
        "aligner": split(image, "aligner"),
        "sam": whole_sam,  # one module: its parts run at the rate of the whole
        "sam_adaptor": whole_sam,
        "embedding": {"forward": elements, "backward": elements},
        "layer": split(decoder, "decoder", "attention"),
        "head": split(decoder, "head"),
    }


def _vision_seconds(stage: Stage, dtype: torch.dtype, timer: Timer, images: int) -> dict[str, Seconds]:
    """Towers and adaptor, for each of `images` images."""
    assert stage.first_stage is not None
    towers, adaptor = stage.first_stage.towers, stage.first_stage.adaptor
    device, model = next(adaptor.parameters()).device, stage.model
    positions = model.tokens_per_image
    pixels = torch.rand(images, 3, model.image_size, model.image_size, device=device)
    low_features = torch.rand(images, positions, model.siglip.width, device=device, dtype=dtype, requires_grad=True)
    seconds = {"siglip": timer(lambda: towers.encode_frozen(pixels, ("siglip",))["siglip"])}
    high_features = None
    if model.sam is not None and towers.sam is not None:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(stage.component_of(name) != "sam")
        sam, of_type = towers.sam, pixels.to(dtype)
        seconds["sam"] = seconds["sam_adaptor"] = timer(lambda: sam(of_type))
        width = model.sam.downsample[1]
        high_features = torch.rand(images, positions, width, device=device, dtype=dtype, requires_grad=True)
    seconds["aligner"] = timer(lambda: adaptor(high_features, low_features))
    return {part: {name: value / images for name, value in taken.items()} for part, taken in seconds.items()}


def _decoder_seconds(stage: Stage, tokens: int, dtype: torch.dtype, timer: Timer) -> dict[str, Seconds]:
    """Embedding, one layer, head with loss, on one document."""
    assert stage.first_stage is not None
    assert stage.last_stage is not None
    first, last, decoder = stage.first_stage, stage.last_stage, stage.model.decoder
    device = first.embedding.weight.device
    batch = _text(tokens, decoder.vocab).to(device)
    documents = describe_documents(batch, decoder.hidden // decoder.heads, decoder.rope_theta, dtype)
    hidden = torch.randn(tokens, 1, decoder.hidden, device=device, dtype=dtype, requires_grad=True)

    def layers() -> Tensor:
        out = hidden
        for layer in stage.decoder.layers:
            out, _ = layer(hidden_states=out, attention_mask=None, packed_seq_params=documents)
        return out

    def head() -> Tensor:
        return last(stage.decoder.final_layernorm(hidden), batch.labels).sum()

    in_a_row = timer(layers)
    return {
        "embedding": timer(lambda: first.embedding(batch.tokens)),
        "layer": {name: seconds / len(stage.decoder.layers) for name, seconds in in_a_row.items()},
        "head": timer(head),
    }


def time_part(run: Callable[[], Tensor], device: torch.device, rest: float = 0.0) -> Seconds:
    """Median seconds of a part's forward and of its backward pass."""
    taken: dict[str, list[float]] = {"forward": [], "backward": []}

    def pass_s(function: Callable[[], Any]) -> tuple[Any, float]:
        began = _now(device)
        result = function()
        seconds = _now(device) - began
        time.sleep(rest * seconds)
        return result, seconds

    for attempt in range(REPEATS + 1):
        out, forward_s = pass_s(run)
        _, backward_s = pass_s(lambda out=out: out.backward(torch.ones_like(out)))  # type: ignore[misc]
        if attempt:
            taken["forward"].append(forward_s)
            taken["backward"].append(backward_s)
    return {direction: statistics.median(values) for direction, values in taken.items()}


def _now(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do.

    Of a single thread on the CPU those for which it computed: what others on the machine take does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def _text(tokens: int, vocab: int) -> MicroBatch:
    """One document of made-up text."""
    ids = torch.arange(tokens) % vocab
    return MicroBatch(
        tokens=ids,
        labels=ids,
        positions=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        max_document=tokens,
        pixels=None,
        image_slots=torch.zeros(0, dtype=torch.int64),
        num_images=0,
        modality="language",
        sample_ids=(("calibration", 0),),
    )
