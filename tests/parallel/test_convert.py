"""Conversion against real worlds: tables equal built stages, a converted run trains on as if never converted."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import MODEL, ROWS, Plan, train
from convert_cases import compare_layout, converted_logits
from world import World

from megavl.checkpoint.convert import dist, ranks
from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Format, WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.run import Request
from megavl.checkpoint.convert.run import convert as convert_folder
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.folder import find_newest
from megavl.checkpoint.hf_names import to_megavl
from megavl.config import DecoderConfig, ParallelConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.model.sizes import SIZES
from tests.numerics.hf_reference import reference_images, reference_model, relative_difference

TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
PP2_VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2)
PP2_VPP2_DP2 = ParallelConfig(pipeline=2, virtual_pipeline=2, distributed_optimizer=True)
TP2_DP2 = ParallelConfig(tensor=2, distributed_optimizer=True)
UNEVEN = ParallelConfig(pipeline=2, layout="1,3")


@pytest.mark.parametrize("parallel", [TP2_PP2, PP2_VPP2, UNEVEN], ids=["tp2pp2", "pp2vpp2", "pp2_uneven"])
def test_tables_equal_built_stages(world: World, parallel: ParallelConfig) -> None:
    """Names, places, cuts, shapes and the very values of a rank's part; and no tensor is left out."""
    names = set()
    for built, table in world.run(compare_layout, MODEL, parallel, ranks=parallel.tensor * parallel.pipeline):
        assert table == built
        names |= built.keys()
    assert names == full_shapes(MODEL).keys()


def convert(form: Format, contents: Contents, folder: Path, parallel: ParallelConfig = TP2_PP2) -> Contents:
    """Write and read again."""
    folder.mkdir(parents=True)
    form.write(contents, folder, WriteOptions(parallel=parallel), lambda _: None)
    return form.read(folder)


RESUMED = {
    "fp32_tp2pp2_to_pp2vpp2dp2": (Plan(parallel=TP2_PP2), PP2_VPP2_DP2, 4),
    "fp32_tp2dp2_to_pp2_uneven": (Plan(parallel=TP2_DP2), UNEVEN, 2),
    "bf16_tp2_to_tp2dp2": (Plan(parallel=ParallelConfig(tensor=2), dtype=torch.bfloat16, stage=2), TP2_DP2, 4),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_converted_run_trains_on_as_if_never_converted(world: World, tmp_path: Path, case: str) -> None:
    """Saved by training -> rank files at two layouts -> saved by the converter -> training under another layout."""
    plan, parallel, number = RESUMED[case]
    before = plan.parallel.tensor * plan.parallel.pipeline * (2 if plan.parallel.distributed_optimizer else 1)
    run, converted = tmp_path / "run", tmp_path / "converted"
    plan = Plan(parallel=plan.parallel, stage=plan.stage, dtype=plan.dtype, run=str(run), save_at=(3,), steps=5)
    whole = world.run(train, plan, ranks=before)[0]
    assert whole["problems"] == []
    contents = dist.read(run)
    contents = convert(ranks.FORMAT, contents, tmp_path / "tp2pp2", TP2_PP2)
    contents = convert(ranks.FORMAT, contents, tmp_path / "pp2vpp2", PP2_VPP2)
    convert(dist.FORMAT, contents, converted / "checkpoints" / "step_00000003")
    target = Plan(parallel=parallel, stage=plan.stage, dtype=plan.dtype, load=str(converted), steps=5)
    answer = world.run(train, target, ranks=number)[0]
    assert answer["loaded"].extra == {"rows": 3 * ROWS}
    assert not answer["loaded"].same_layout
    if plan.dtype is torch.float32:
        expected = {key: whole[key][3:] for key in ("losses", "norms")}
    else:  # layouts differ by rounding: the run that was never converted changes its layout too
        expected = world.run(train, replace(target, load=str(run)), ranks=number)[0]
    assert answer["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert answer["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_converted_weights_start_a_run(world: World, tmp_path: Path) -> None:
    """Weights alone, as of a public model: what `checkpoint.init_from` loads has the same bytes."""
    run, again = tmp_path / "run", tmp_path / "again"
    world.run(train, Plan(parallel=PP2_VPP2, run=str(run), steps=0, save_at=(0,)), ranks=2)
    saved = dist.read(run)
    public = Contents(model=saved.model, tensors=saved.tensors)
    convert(dist.FORMAT, public, tmp_path / "public")
    plan = Plan(parallel=TP2_PP2, load_model=str(tmp_path / "public"), run=str(again), steps=0, save_at=(0,))
    world.run(train, plan)
    newest = find_newest(again)
    assert newest is not None
    loaded = dist.read(newest)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert torch.equal(tensor.read(), loaded.tensors[name].read()), name


def test_a_released_model_computes_the_same_over_ranks(world: World, tmp_path: Path) -> None:
    """hf-deepseek -> megatron-dist -> tensor 2 x pipeline 2: the logits of `transformers` with the source's weights."""
    tiny = SIZES["tiny_hybrid"]
    assert tiny.sam is not None
    decoder = DecoderConfig(layers=3, hidden=96, heads=6, kv_heads=2, ffn=136, vocab=160)
    model = replace(tiny, decoder=decoder, sam=replace(tiny.sam, neck=16, downsample=(32, 64)))
    image_id, slots = 5, model.tokens_per_image
    reference = reference_model(model, image_id=image_id)
    weights = {name: in_memory(tensor.float(), name) for name, tensor in reference.state_dict().items()}
    source = tmp_path / "released"
    source.mkdir()
    contents = Contents(model=model, tensors=to_megavl(weights, model, "transformers"))
    DEEPSEEK.write(contents, source, WriteOptions(), lambda _: None)
    request = Request(source=source, target=tmp_path / "start", to="megatron-dist")
    convert_folder(request, lambda what, total: nullcontext(lambda count: None))

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(image_id + 1, decoder.vocab, (2 * slots + 11,), generator=generator)
    image_slots = torch.cat([torch.arange(3, 3 + slots), torch.arange(7 + slots, 7 + 2 * slots)])
    tokens[image_slots] = image_id
    pixels = torch.randint(0, 256, (2, 3, model.image_size, model.image_size), generator=generator)
    batch = MicroBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        positions=torch.arange(len(tokens)),
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        max_document=len(tokens),
        pixels=pixels.to(torch.uint8),
        image_slots=image_slots,
        num_images=2,
        modality="multimodal",
        sample_ids=(("test", 0),),
    )
    with torch.no_grad():
        images = reference_images(pixels.double() / 255, model)
        expected = reference(input_ids=tokens[None], **images).logits[0]
    parallel = ParallelConfig(tensor=2, pipeline=2, sequence=True)
    for logits in world.run(converted_logits, model, parallel, str(tmp_path / "start"), batch):
        assert relative_difference(logits, expected) <= 1e-5
