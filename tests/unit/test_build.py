"""Layer splits, what the configuration says to megatron-core, and what is refused; what CUDA is told."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from megatron.core.transformer.enums import LayerType

from megavl.config import ParallelConfig
from megavl.model.build import split_layers, transformer_config
from megavl.model.sizes import SIZES, count_parameters, count_unused_parameters
from megavl.model.stage import Stage
from megavl.parallel.groups import _choose_device, _join_world, destroy_groups, init_groups

CPU = torch.device("cpu")


def config_of(parallel: ParallelConfig, name: str = "tiny"):
    return transformer_config(SIZES[name], parallel, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (4, 1, (4,)),
        (4, 2, (2, 2)),
        (5, 2, (2, 3)),
        (30, 4, (7, 8, 8, 7)),
        (31, 4, (7, 8, 8, 8)),
        (6, 4, (1, 2, 2, 1)),
        (3, 4, (0, 1, 1, 1)),
    ],
)
def test_even_split_spares_first_and_last(layers: int, stages: int, split: tuple[int, ...]) -> None:
    assert split_layers(layers, ParallelConfig(pipeline=stages)) == split
    if stages > 2:
        return
    assert split_layers(layers, ParallelConfig(pipeline=1, virtual_pipeline=stages)) == split


def test_layout_is_taken_as_written() -> None:
    assert split_layers(30, ParallelConfig(pipeline=4, layout="8, 8,8,6")) == (8, 8, 8, 6)
    assert split_layers(30, ParallelConfig(pipeline=2, virtual_pipeline=2, layout="0,10,10,10")) == (0, 10, 10, 10)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("8,8,8", "names 3 stages, pipeline \\* virtual_pipeline is 4"),
        ("8,8,8,8", "places 32 layers, the model has 30"),
        ("8;8;8;6", "write decoder layers per stage"),
        ("8,8,8,-6", "write decoder layers per stage"),
    ],
)
def test_layout_that_does_not_fit(layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_layers(30, ParallelConfig(pipeline=4, layout=layout))


def test_layout_reaches_megatron() -> None:
    config = config_of(ParallelConfig(pipeline=4, layout="8,8,8,6"), "7b")
    rows = [config.pipeline_model_parallel_layout.layout[rank][0] for rank in range(4)]
    assert [row.count(LayerType.decoder) for row in rows] == [8, 8, 8, 6]
    assert rows[0][0] == LayerType.embedding
    assert rows[-1][-1] == LayerType.loss


def test_virtual_stages_overlap_their_messages() -> None:
    """Two pipeline ranks with virtual stages are silently wrong under batched messages (traps, section I)."""
    virtual = config_of(ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert virtual.overlap_p2p_comm
    assert not virtual.batch_p2p_comm
    assert virtual.virtual_pipeline_model_parallel_size == 2
    plain = config_of(ParallelConfig(pipeline=2))
    assert not plain.overlap_p2p_comm
    assert plain.virtual_pipeline_model_parallel_size is None


def test_cpu_keeps_pipeline_outputs_and_does_not_compile() -> None:
    config = config_of(ParallelConfig(pipeline=2))
    assert not config.deallocate_pipeline_outputs
    assert not config.bias_activation_fusion
    cuda = transformer_config(SIZES["tiny"], ParallelConfig(), dtype=torch.bfloat16, device=torch.device("cuda"))
    assert cuda.deallocate_pipeline_outputs
    assert cuda.bf16
    assert cuda.params_dtype == cuda.pipeline_dtype == torch.bfloat16


def test_loss_is_per_token_and_recompute_is_asked_for() -> None:
    assert config_of(ParallelConfig()).calculate_per_token_loss
    assert config_of(ParallelConfig()).recompute_granularity is None
    assert config_of(ParallelConfig(recompute="selective")).recompute_modules == ["core_attn"]
    assert config_of(ParallelConfig(recompute="full")).recompute_method == "uniform"


@pytest.mark.parametrize(
    ("field", "size"), [("heads", 4), ("kv_heads", 4), ("ffn", 352), ("vocab", 1023)], ids=lambda v: str(v)
)
def test_sizes_that_the_tensor_size_would_cut(field: str, size: int) -> None:
    tensor = {"heads": 8, "kv_heads": 8, "ffn": 3, "vocab": 2}[field]
    sizes = {"heads": 24, "kv_heads": 24, "ffn": 24, "vocab": 24} | {field: size}
    model = replace(SIZES["tiny"], decoder=replace(SIZES["tiny"].decoder, **sizes))
    with pytest.raises(ValueError, match=f"{field} = {size} does not divide by parallel.tensor = {tensor}"):
        config_of_model(model, tensor)


def config_of_model(model, tensor: int):
    return transformer_config(model, ParallelConfig(tensor=tensor), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["1.3b", "7b"])
def test_released_sizes_to_the_parameter(name: str) -> None:
    """Counted on the built model (without storage), per component."""
    model, parallel = SIZES[name], ParallelConfig()
    config = transformer_config(model, parallel, dtype=torch.bfloat16, device=torch.device("cpu"))
    groups = init_groups(parallel)
    with torch.device("meta"):
        stage = Stage(
            model,
            config,
            num_layers=model.decoder.layers,
            pg=groups.pg,
            pre_process=True,
            post_process=True,
            vp_stage=None,
        )
    destroy_groups()
    counted: dict[str, int] = {}
    for parameter_name, parameter in stage.named_parameters():
        component = stage.component_of(parameter_name)
        counted[component] = counted.get(component, 0) + parameter.numel()
    assert counted == {component: n for component, n in count_parameters(model).items() if n}
    total = {"1.3b": 1_975_235_584, "7b": 7_343_990_017}[name]
    assert sum(counted.values()) + count_unused_parameters(model) == total


def test_fp32_is_fp32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    assert _choose_device("cuda") == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_nccl_connects_a_group_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: told.update(options))
    _join_world("nccl", timedelta(seconds=60))
    assert told["timeout"] == timedelta(seconds=60)
    assert "device_id" not in told
