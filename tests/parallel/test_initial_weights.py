"""Every layout starts from the model that one process starts from, bit for bit, and loads the same tensors."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from world import World

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import MicroBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters, full_shape, join_shards, load_full_state
from megavl.parallel.groups import init_groups
from megavl.parallel.random_state import seed_everything
from megavl.training.synthetic_batches import global_batch

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=5, hidden=32, heads=4, kv_heads=2, ffn=24, vocab=48, init_std=0.1),
    siglip=SiglipConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp=16),
    sam=SamConfig(
        image_size=32,
        patch_size=4,
        width=16,
        layers=2,
        heads=2,
        mlp=16,
        window=4,
        global_layers=(1,),
        neck=8,
        upsample=16,
        downsample=(8, 16),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2sp_pp2": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "pp2_uneven": ParallelConfig(pipeline=2, layout="4,1"),
    "pp2_first_without_layers": ParallelConfig(pipeline=2, layout="0,5"),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
}


def shards_of_this_rank(
    parallel: ParallelConfig, load: dict[str, Tensor] | None
) -> tuple[int, dict[str, Tensor], list]:
    """(tensor rank, its slice of every parameter by full name, what `join_shards` needs to know of each)."""
    groups = init_groups(parallel)
    stages = build_stages(MODEL, parallel, dtype=torch.float32, seed=7, pg=groups.pg, device=groups.device)
    if load is not None:
        load_full_state(stages, load)
    slices = {name: p.detach().clone() for name, _, p in full_parameters(stages)}
    marks = ("tensor_model_parallel", "partition_dim", "partition_stride")
    info = [(n, {m: getattr(p, m) for m in marks}, full_shape(s, p)) for n, s, p in full_parameters(stages)]
    return groups.tensor_rank, slices, info


def whole_model(world: World, parallel: ParallelConfig, load: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every parameter, joined from all ranks; copies must agree."""
    answers = world.run(shards_of_this_rank, parallel, load, ranks=parallel.tensor * parallel.pipeline)
    whole: dict[str, Tensor] = {}
    for _, _, info in answers:
        for name, marks, shape in info:
            by_rank = {rank: slices[name] for rank, slices, _ in answers if name in slices}
            like = torch.nn.Parameter(by_rank[0])
            for mark, value in marks.items():
                setattr(like, mark, value)
            if not marks["tensor_model_parallel"]:
                assert all(torch.equal(by_rank[0], copy) for copy in by_rank.values()), name
            whole[name] = join_shards([by_rank[rank] for rank in sorted(by_rank)], like)
            assert tuple(whole[name].shape) == shape, name
    return whole


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str, Tensor]:
    return whole_model(world, ParallelConfig())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_model_under_every_layout(world: World, alone: dict[str, Tensor], layout: str) -> None:
    whole = whole_model(world, LAYOUTS[layout])
    assert whole.keys() == alone.keys()
    assert [name for name in alone if not torch.equal(alone[name], whole[name])] == []


def test_parameters_differ_from_each_other(alone: dict[str, Tensor]) -> None:
    first, second = (alone[f"decoder.layers.{n}.self_attention.linear_qkv.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(MODEL.decoder.init_std, rel=0.05)
    residual = alone["decoder.layers.0.mlp.linear_fc2.weight"].std().item()
    assert residual == pytest.approx(MODEL.decoder.init_std / (2 * MODEL.decoder.layers) ** 0.5, rel=0.1)


def test_full_tensors_reach_every_rank(world: World, alone: dict[str, Tensor]) -> None:
    tensors = {name: torch.randn_like(tensor) for name, tensor in alone.items()}
    whole = whole_model(world, LAYOUTS["tp2sp_pp2"], tensors)
    assert [name for name in alone if not torch.equal(tensors[name], whole[name])] == []


def logits_of_this_rank(parallel: ParallelConfig) -> Tensor:
    """Logits of this rank's part of the vocabulary, [t, v/tp], for two documents with an image in the second."""
    groups = init_groups(parallel)
    seed_everything(7, groups)
    stages = build_stages(MODEL, parallel, dtype=torch.float32, seed=7, pg=groups.pg, device=groups.device)
    per_image, generator = MODEL.tokens_per_image, torch.Generator().manual_seed(3)
    lengths = (6, per_image + 8)
    batch = MicroBatch(
        tokens=torch.randint(MODEL.decoder.vocab, (sum(lengths),), generator=generator),
        labels=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        max_document=max(lengths),
        pixels=torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator),
        image_slots=torch.arange(9, 9 + per_image),
        num_images=1,
        modality=None,
        sample_ids=(),
    )
    with torch.no_grad():
        return stages[0].logits(batch)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_compute_what_one_does(world: World, sequence: bool) -> None:
    """Slices that fit together are not enough: gate and up rows, heads and vocabulary must meet their partners."""
    (expected,) = world.run(logits_of_this_rank, ParallelConfig(), ranks=1)
    parts = world.run(logits_of_this_rank, ParallelConfig(tensor=2, sequence=sequence), ranks=2)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


def first_stage_of_this_rank(parallel: ParallelConfig, tensor_groups: list[list[int]] | None) -> tuple[int, Tensor]:
    """(tensor rank, what the first stage gives this rank), with other tensor groups than those of the default grid."""
    groups = init_groups(parallel)
    seed_everything(7, groups)
    pg = copy.copy(groups.pg)
    for ranks in tensor_groups or []:
        group = dist.new_group(ranks)
        if groups.rank in ranks:
            pg.tp = group
    (stage,) = build_stages(MODEL, parallel, dtype=torch.float32, seed=7, pg=pg, device=groups.device)
    with torch.no_grad():
        return pg.tp.rank(), stage.first_stage(global_batch(MODEL, "image", micro_batches=3)[2])  # three images


def test_the_first_stage_uses_the_groups_that_it_is_given(world: World) -> None:
    ((_, expected),) = world.run(first_stage_of_this_rank, ParallelConfig(), None, ranks=1)
    parallel = ParallelConfig(tensor=2, sequence=True)
    answers = world.run(first_stage_of_this_rank, parallel, [[0, 2], [1, 3]])
    assert [rank for rank, _ in answers] == [0, 0, 1, 1]  # the default grid has (0, 1) and (2, 3)
    for first, second in ((0, 2), (1, 3)):
        hidden = torch.cat([answers[first][1], answers[second][1]])
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
