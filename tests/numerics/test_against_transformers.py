"""The whole model on one process against `transformers`: logits, loss and every parameter's gradient.

The reference gets padded rows with an attention mask, as its users run it; we get the same documents as one stream. The
decoder groups its heads, sequence lengths are odd, images stand first, in the middle, last and side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hf_reference import (
    assert_close,
    build_reference,
    from_transformers,
    gradients,
    reference_images,
    reference_model,
    relative_difference,
    to_transformers,
)
from torch import Tensor, nn

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters, load_full_state
from megavl.model.sizes import SIZES
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups, destroy_groups, init_groups

IMAGE = 5
"""Placeholder id."""
SIGLIP_ONLY = ModelConfig(
    decoder=DecoderConfig(layers=3, hidden=96, heads=6, kv_heads=2, ffn=136, vocab=160),
    siglip=SiglipConfig(image_size=27, patch_size=9, width=30, layers=2, heads=5, mlp=50),
    sam=None,
    adaptor="mlp_gelu",
    background=(127, 127, 127),
)
HYBRID = replace(
    SIGLIP_ONLY,
    decoder=DecoderConfig(layers=2, hidden=88, heads=4, kv_heads=4, ffn=100, vocab=128, rope_theta=500.0),
    siglip=SiglipConfig(image_size=24, patch_size=8, width=30, layers=2, heads=3, mlp=50),
    sam=SamConfig(
        image_size=40, patch_size=8, width=36, layers=4, heads=3, mlp=44, window=3, global_layers=(1, 3), neck=10,
        upsample=12, downsample=(20, 40),
    ),
    adaptor="hybrid",
)  # fmt: skip
SEED = 1
"""Of the weights. Alpha's gradient is one number, a sum over all slots and channels. Under this seed it is 1/5 to 1/10
of the sum of its terms' sizes; under seed 0 it once cancels to 1/400, and 1e-5 of that is below fp32's resolution."""
MODELS = {"siglip": SIGLIP_ONLY, "hybrid": HYBRID, "tiny": SIZES["tiny"]}

Document = tuple[int | str, ...]
"""Runs of text by their length, and "image"."""
BATCHES: dict[str, tuple[Document, ...]] = {
    "one document": ((13, "image", 18),),
    "several images": ((3, "image", 7, "image", "image", 5),),
    "documents": ((23,), ("image", 11), (1, "image", 2, "image", 9), (6, "image")),
    "text": ((17,), (1, 1), (30,)),
}


@dataclass(frozen=True)
class Rows:
    """The same documents padded to rows, [b, s], for `transformers`, and as one stream for us."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    stream: MicroBatch


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield init_groups(ParallelConfig(device="cpu"))
    destroy_groups()


def make_rows(documents: tuple[Document, ...], model: ModelConfig) -> Rows:
    """Random text and pixels; about a third of the text is not learnt, images never."""
    generator = torch.Generator().manual_seed(len(documents))
    rows: list[Tensor] = []
    for document in documents:
        runs = [
            torch.full((model.tokens_per_image,), IMAGE)
            if run == "image"
            else torch.randint(IMAGE + 1, model.decoder.vocab, (int(run),), generator=generator)
            for run in document
        ]
        rows.append(torch.cat(runs))
    lengths = [len(row) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [b, s]
    mask = torch.arange(tokens.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    labels = tokens.masked_fill((tokens == IMAGE) | ~mask, IGNORE)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
    shifted = torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), IGNORE)], dim=1)  # transformers shifts itself
    images = sum(run == "image" for document in documents for run in document)
    pixels = torch.randint(0, 256, (images, 3, model.image_size, model.image_size), generator=generator)
    stream = MicroBatch(
        tokens=tokens[mask],
        labels=shifted[mask],
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_document=max(lengths),
        pixels=pixels.to(torch.uint8) if images else None,
        image_slots=(tokens[mask] == IMAGE).nonzero().flatten(),
        num_images=images,
        modality=None,
        sample_ids=(("test", 0),),
    )
    return Rows(tokens=tokens, labels=labels, mask=mask, stream=stream)


def run_reference(reference: nn.Module, rows: Rows, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Logits of the stream's positions, [t, v], and the mean loss; gradients are left in `reference`."""
    images = {}
    if rows.stream.pixels is not None:
        images = reference_images(rows.stream.pixels.double() / 255, model)
    output = reference(
        input_ids=rows.tokens, attention_mask=rows.mask.long(), labels=rows.labels, use_cache=False, **images
    )
    output.loss.backward()
    return output.logits[rows.mask], output.loss


def build(model: ModelConfig, groups: Groups, state: dict[str, Tensor]) -> Stage:
    (stage,) = build_stages(model, ParallelConfig(), dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    load_full_state([stage], state)
    return stage


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient(name: str, batch: str, groups: Groups) -> None:
    model = MODELS[name]
    rows = make_rows(BATCHES[batch], model)
    reference = reference_model(model, image_id=IMAGE, seed=SEED)
    stage = build(model, groups, from_transformers(reference.state_dict(), model))
    stream = rows.stream.to(groups.device)
    with torch.no_grad():
        logits = stage.logits(stream)
    losses = stage(stream)
    loss = losses.sum() / (stream.labels != IGNORE).sum()
    loss.backward()

    expected_logits, expected_loss = run_reference(reference, rows, model)
    assert relative_difference(logits.cpu(), expected_logits) <= 1e-5
    assert relative_difference(loss.cpu(), expected_loss) <= 1e-5
    ours = {full_name: parameter.grad for full_name, _, parameter in full_parameters([stage])}
    assert len(ours) == len(list(stage.parameters()))
    if rows.stream.num_images == 0:  # text leaves the towers alone on both sides
        assert all(
            p.grad is None
            for n, p in reference.named_parameters()
            if "language_model" not in n and n != "lm_head.weight"
        )
        for parameter in reference.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs = from_transformers(gradients(reference), model)
    assert ours.keys() == theirs.keys()
    vision = {n for n in ours if n.startswith(("first_stage.towers", "first_stage.adaptor"))}
    if rows.stream.num_images == 0:
        assert all((ours[n] == 0).all() for n in vision)
        ours, theirs = ({n: g for n, g in side.items() if n not in vision} for side in (ours, theirs))
    assert_close({n: g.cpu() for n, g in ours.items()}, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_come_back(name: str, groups: Groups) -> None:
    model = MODELS[name]
    state = reference_model(model, dtype=torch.float32).state_dict()
    stage = build(model, groups, from_transformers(state, model))
    back = to_transformers({n: p.detach().cpu() for n, _, p in full_parameters([stage])}, model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)


@pytest.mark.parametrize(("size", "tensors"), [("7b", 854), ("1.3b", 612)])
def test_released_sizes_have_transformers_names(size: str, tensors: int) -> None:
    with torch.device("meta"):
        state = build_reference(SIZES[size]).state_dict()
    assert len(state) == tensors
    from_transformers(state, SIZES[size])  # every name used once, none left over
