"""Separately published weights, assembled by the real command: the parts compute what `transformers` computes.

Tiny checkpoints with random weights in every dialect and kind of file. The language model groups its heads, SAM's
windows are padded, and every weight is random, so that a tensor in another's place shows.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hf_reference import randomise, relative_difference
from torch import Tensor, nn

from megavl.checkpoint.convert.assemble import fresh_tensors
from megavl.checkpoint.convert.public_names import FRESH_PREFIXES
from megavl.checkpoint.convert.run import open_checkpoint
from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import MicroBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters, load_full_state
from megavl.model.sizes import SIZES
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups, destroy_groups, init_groups

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from assemble_checkpoint import main

SEED = 11
HYBRID = ModelConfig(
    decoder=DecoderConfig(layers=2, hidden=48, heads=4, kv_heads=2, ffn=40, vocab=64, rope_theta=500.0),
    siglip=SiglipConfig(image_size=40, patch_size=8, width=30, layers=2, heads=3, mlp=50),
    sam=SamConfig(
        image_size=56, patch_size=8, width=36, layers=3, heads=3, mlp=44, window=3, global_layers=(1,), neck=10,
        upsample=20, downsample=(20, 40),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)  # fmt: skip
ALONE = replace(HYBRID, sam=None, adaptor="mlp_gelu", background=(127, 127, 127))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Public:
    """The three models as `transformers` has them, in fp64, and where their weights lie in every dialect."""

    root: Path
    language: nn.Module
    siglip: nn.Module
    sam: nn.Module


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield init_groups(ParallelConfig(device="cpu"))
    destroy_groups()


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Public:
    """Write every dialect once."""
    root = tmp_path_factory.mktemp("public")
    language, siglip, sam = make_language(), make_siglip(), make_sam()
    language.save_pretrained(root / "llama", max_shard_size="20KB")
    assert len(list((root / "llama").glob("*.safetensors"))) > 2
    (root / "llama_bin").mkdir()
    torch.save(language.state_dict(), root / "llama_bin" / "pytorch_model.bin")
    (root / "llama_bin" / "config.json").write_text((root / "llama" / "config.json").read_text())
    siglip.save_pretrained(root / "siglip")
    siglip.vision_model.save_pretrained(root / "siglip_vision")
    vision = {n.removeprefix("vision_model."): t for n, t in siglip.state_dict().items() if n.startswith("vision")}
    old_names = {"vision_model." + name: t.contiguous() for name, t in vision.items()}
    safetensors.torch.save_file(old_names, root / "siglip_old.safetensors")
    (root / "timm").mkdir()
    safetensors.torch.save_file(timm_names(vision), root / "timm" / "model.safetensors")
    (root / "open_clip").mkdir()
    text = {"text.ln_final.weight": torch.ones(3), "logit_scale": torch.zeros(())}
    trunk = {"visual.trunk." + name: tensor for name, tensor in timm_names(vision).items()}
    torch.save(trunk | text, root / "open_clip" / "open_clip_pytorch_model.bin")
    sam.save_pretrained(root / "sam")
    meta = meta_names({n: t for n, t in sam.state_dict().items() if n.startswith("vision_encoder.")})
    torch.save(meta | {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 8)}, root / "sam_vit_b.pth")
    return Public(root, language.double(), siglip.vision_model.double(), sam.vision_encoder.double())


def make_language() -> nn.Module:
    size = HYBRID.decoder
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        rms_norm_eps=size.norm_eps,
        rope_theta=size.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    module = transformers.LlamaForCausalLM(config).eval()
    randomise(module, seed=1)
    return module


def make_siglip() -> nn.Module:
    size = HYBRID.siglip
    vision = {
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "hidden_act": "gelu",
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    module = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)).eval()
    randomise(module, seed=2)
    return module


def make_sam() -> nn.Module:
    size = HYBRID.sam
    assert size is not None
    vision = {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "mlp_dim": size.mlp,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "window_size": size.window,
        "global_attn_indexes": list(size.global_layers),
        "output_channels": size.neck,
    }
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 8, "image_size": size.image_size, "patch_size": size.patch_size},
        mask_decoder_config={"hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    )
    module = transformers.SamModel(config).eval()
    randomise(module, seed=3)
    return module


def timm_names(vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' SigLIP in timm's names, written out by hand."""
    named: dict[str, Tensor] = {"pos_embed": vision["embeddings.position_embedding.weight"][None]}
    pool = "head.attention."
    for p in ("weight", "bias"):
        named[f"patch_embed.proj.{p}"] = vision[f"embeddings.patch_embedding.{p}"]
        named[f"norm.{p}"] = vision[f"post_layernorm.{p}"]
        for n in range(HYBRID.siglip.layers):
            theirs, ours = f"encoder.layers.{n}.", f"blocks.{n}."
            named[f"{ours}attn.qkv.{p}"] = torch.cat([vision[f"{theirs}self_attn.{x}_proj.{p}"] for x in "qkv"])
            named[f"{ours}attn.proj.{p}"] = vision[f"{theirs}self_attn.out_proj.{p}"]
            for left, right in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
                named[f"{ours}{left}.{p}"] = vision[f"{theirs}{right}.{p}"]
        query, *key_and_value = vision[f"{pool}in_proj_{p}"].chunk(3)
        named[f"attn_pool.q.{p}"], named[f"attn_pool.kv.{p}"] = query, torch.cat(key_and_value)
        named[f"attn_pool.proj.{p}"] = vision[f"{pool}out_proj.{p}"]
        named[f"attn_pool.norm.{p}"] = vision[f"head.layernorm.{p}"]
        for layer in ("mlp.fc1", "mlp.fc2"):
            named[f"attn_pool.{layer}.{p}"] = vision[f"head.{layer}.{p}"]
    named["attn_pool.latent"] = vision["head.probe"]
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def meta_names(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' SAM encoder in Meta's names."""
    words = {
        "vision_encoder.": "image_encoder.",
        ".projection.": ".proj.",
        "layers.": "blocks.",
        ".layer_norm": ".norm",
        "neck.conv1": "neck.0",
        "neck.norm1": "neck.1",
        "neck.conv2": "neck.2",
        "neck.norm2": "neck.3",
    }
    named = {}
    for name, tensor in encoder.items():
        for theirs, metas in words.items():
            name = name.replace(theirs, metas)
        named[name] = tensor.clone()
    return named


RECIPE = """
from megavl.config import *


def recipe() -> Recipe:
    return Recipe(
        run_dir="run",
        model={model!r},
        parallel=ParallelConfig(),
        data=DataConfig(tokenizer="tokenizer.json", sources=(), seq_length=8),
        stage=StageConfig(number=1, steps=1, global_batch=1, micro_batch=1),
        optim=OptimConfig(lr=1.0, schedule="cosine", warmup_steps=0),
    )
"""


def recipe_of(model: ModelConfig, folder: Path) -> str:
    """A recipe file with this model, for `--model`."""
    (folder / "recipe.py").write_text(RECIPE.format(model=model))
    return str(folder / "recipe.py")


def build(model: ModelConfig, groups: Groups) -> Stage:
    parallel = ParallelConfig(device="cpu")
    return build_stages(model, parallel, dtype=torch.float32, seed=SEED, pg=groups.pg, device=groups.device)[0]


CASES: dict[str, tuple[ModelConfig, str, str, str | None, str]] = {
    "safetensors, whole models of transformers": (HYBRID, "llama", "siglip", "sam", "megatron-dist"),
    "torch files, timm, Meta": (HYBRID, "llama_bin", "timm", "sam_vit_b.pth", "megatron-dist"),
    "open_clip": (HYBRID, "llama", "open_clip", "sam_vit_b.pth", "hf-deepseek"),
    "vision model alone": (ALONE, "llama", "siglip_vision", None, "hf-transformers"),
    "names of transformers 4": (ALONE, "llama", "siglip_old.safetensors", None, "megatron-dist"),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_compute_what_transformers_computes(case: str, public: Public, groups: Groups, tmp_path: Path) -> None:
    model, language, siglip, sam, to = CASES[case]
    words = ["--language", str(public.root / language), "--siglip", str(public.root / siglip)]
    words += ["--sam", str(public.root / sam)] if sam else []
    words += ["--model", recipe_of(model, tmp_path), "--seed", str(SEED), "--to", to]
    words += [str(tmp_path / "start")]
    assert main(words) == 0
    contents = open_checkpoint(tmp_path / "start")[1]
    assert contents.model == model
    stage = build(model, groups)
    fresh = {n: p.detach().clone() for n, _, p in full_parameters([stage]) if n.startswith(FRESH_PREFIXES)}
    load_full_state([stage], {name: tensor.read() for name, tensor in contents.tensors.items()})
    loaded = {name: p.detach() for name, _, p in full_parameters([stage])}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in fresh.items())
    assert fresh.keys() == fresh_tensors(model, SEED).keys()
    check_language(stage, public)
    check_towers(stage, public)
    assert len(contents.unused) == 13
    pooled = {name.rpartition("attn_pool.")[2]: tensor.read() for name, tensor in contents.unused.items()}
    expected = timm_names({name: tensor.float() for name, tensor in public.siglip.state_dict().items()})
    assert all(torch.equal(tensor, expected["attn_pool." + name]) for name, tensor in pooled.items())


@torch.no_grad()
def check_language(stage: Stage, public: Public) -> None:
    """Logits of one document."""
    count = 19
    tokens = torch.randint(HYBRID.decoder.vocab, (count,), generator=torch.Generator().manual_seed(4))
    batch = MicroBatch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(count),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        max_document=count,
        pixels=None,
        image_slots=torch.empty(0, dtype=torch.int64),
        num_images=0,
        modality=None,
        sample_ids=(),
    )
    assert relative_difference(stage.logits(batch), public.language(tokens[None]).logits[0]) <= TOLERANCE


@torch.no_grad()
def check_towers(stage: Stage, public: Public) -> None:
    """Features of each tower from the same normalised images."""
    towers, generator = stage.first_stage.towers, torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, HYBRID.siglip.image_size, HYBRID.siglip.image_size, generator=generator)
    expected = public.siglip(images.double()).last_hidden_state
    assert relative_difference(towers.siglip(images), expected) <= TOLERANCE
    if towers.sam is None:
        return
    seen: list[Tensor] = []
    hook = towers.sam.neck.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, HYBRID.sam.image_size, HYBRID.sam.image_size, generator=generator)
    towers.sam(images)
    hook.remove()
    assert relative_difference(seen[0], public.sam(images.double()).last_hidden_state) <= TOLERANCE


def test_what_is_refused_leaves_nothing(public: Public, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: one sentence, exit status 1, no folder."""
    model, target = recipe_of(HYBRID, tmp_path), tmp_path / "start"
    good = {
        "--language": str(public.root / "llama"),
        "--siglip": str(public.root / "timm"),
        "--sam": str(public.root / "sam"),
        "--model": model,
    }
    tied = tmp_path / "tied"
    tied.mkdir()
    config = json.loads((public.root / "llama" / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (tied / "model.safetensors").symlink_to(public.root / "timm" / "model.safetensors")
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save({}, several / name)
    (tmp_path / "notes.txt").write_text("")
    cases = [
        ({"--siglip": str(public.root / "sam_vit_b.pth")}, "no tensor image_encoder.blocks.0.mlp.fc1.weight; 10 of"),
        ({"--siglip": str(public.root / "llama")}, "not a checkpoint of siglip"),
        ({"--sam": str(public.root / "absent")}, "absent: no such file or folder"),
        ({"--sam": str(several)}, "2 files could be meant: a.pth, b.pth"),
        ({"--sam": str(tmp_path / "notes.txt")}, "notes.txt: not a .safetensors"),
        ({"--language": str(public.root / "timm")}, "no config.json"),
        ({"--language": str(tied)}, "a link to"),
        ({"--model": "13b"}, "--model is 13b, known are tiny"),
        ({"--model": "tiny_hybrid"}, "hidden_size is 48, the model has 128; intermediate_size is 40"),
    ]
    for changed, words in cases:
        options = [word for pair in (good | changed).items() for word in pair]
        assert main([*options, str(target)]) == 1
        said = capsys.readouterr().err
        assert words in said, said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "recipe.py", "several", "tied"]


def test_dry_run_lists_and_writes_nothing(public: Public, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--language", str(public.root / "llama"), "--siglip", str(public.root / "open_clip"), "--dry-run"]
    assert main([*words, "--model", recipe_of(ALONE, tmp_path), str(tmp_path / "start")]) == 0
    said = capsys.readouterr().out
    for line in ("timm names below visual.trunk.", "1 text", "1 logit_scale", "fresh from seed 1234: 4 tensors"):
        assert line in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.py"]


def test_fresh_tensors_depend_on_the_seed() -> None:
    model = SIZES["tiny_hybrid"]
    name = "first_stage.towers.sam.downsamples.0.weight"
    first, again, other = (fresh_tensors(model, seed)[name].read() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
