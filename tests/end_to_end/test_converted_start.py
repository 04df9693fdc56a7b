"""From public weights to a trained export by the commands that the README shows, at tiny sizes.

The README's lines run as they stand, in a folder that has tiny checkpoints under the names that they use; its training
run is the real one. What a run starts with must be what was assembled, bit for bit.
"""

import importlib
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from small_run import lines, make_data

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.run import open_checkpoint
from megavl.config import ModelConfig
from megavl.parallel.groups import destroy_groups
from megavl.recipe import load_recipe
from megavl.train import main as train
from megavl.training import stopping

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

ADAPTOR = (
    ("model.aligner.linear1.weight", "first_stage.adaptor.layers.0.weight"),
    ("model.aligner.linear2.bias", "first_stage.adaptor.layers.2.bias"),
)
"""transformers' name, megavl's name."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with data and a recipe; signals and groups as before afterwards."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(stopping, "FAREWELL_S", 0.0)
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in before:
        signal.signal(number, handler)
    destroy_groups()


def readme_commands(tool: str) -> list[list[str]]:
    """The arguments of every command of the README that runs a tool."""
    start, text = f"python tools/{tool}.py ", (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [shlex.split(line.removeprefix(start)) for line in text.splitlines() if line.startswith(start)]


def run_tool(tool: str, arguments: list[str]) -> None:
    assert importlib.import_module(tool).main(arguments) == 0


def publish(model: ModelConfig, folder: Path) -> None:
    """A language model and a SigLIP of these sizes, as `transformers` saves them."""
    decoder, siglip = model.decoder, model.siglip
    torch.manual_seed(0)
    language = transformers.LlamaConfig(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.ffn,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        vocab_size=decoder.vocab,
        rms_norm_eps=decoder.norm_eps,
        tie_word_embeddings=False,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=siglip.width,
        intermediate_size=siglip.mlp,
        num_hidden_layers=siglip.layers,
        num_attention_heads=siglip.heads,
        image_size=siglip.image_size,
        patch_size=siglip.patch_size,
    )
    transformers.LlamaForCausalLM(language).save_pretrained(folder / "deepseek-llm-7b-base")
    transformers.SiglipVisionModel(vision).save_pretrained(folder / "ViT-L-16-SigLIP-384")


def at_the_recipes_size(arguments: list[str]) -> list[str]:
    """Instead of the 7B the recipe's model, which has SigLIP alone and computes in fp32."""
    kept = ["recipe.py" if word == "7b" else word for word in arguments]
    for option in ("--sam", "--dtype"):
        at = kept.index(option)
        del kept[at : at + 2]
    return kept


LR = 1e-6


def check_start(workplace: Path, start: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """One step of stage 1 from `weights/start`: what is frozen has not moved, the adaptor by one update of Adam."""
    options = ("--checkpoint.init_from", "weights/start", "--stage.number", "1", "--stage.steps", "1")
    options += ("--optim.lr", str(LR), "--optim.warmup_steps", "0", "--data.workers", "0", "--run_dir", "runs/stage3")
    assert train(["recipe.py", *options]) == 0
    assert "from weights of weights/start" in (workplace / "runs/stage3/log.txt").read_text()
    assert len(lines(workplace / "runs/stage3")) == 1
    saved = open_checkpoint(workplace / "runs/stage3")[1].tensors
    assert saved.keys() == start.keys()
    for name, tensor in start.items():
        moved = (saved[name].read() - tensor.read()).abs().max().item()
        assert moved <= (1.1 * LR if name.startswith("first_stage.adaptor.") else 0), name
    return saved


@pytest.mark.slow
def test_readme_from_public_weights_to_an_export(workplace: Path) -> None:
    publish(load_recipe("recipe.py").model, workplace)
    (assembling,) = readme_commands("assemble_checkpoint")
    run_tool("assemble_checkpoint", at_the_recipes_size(assembling))
    start = open_checkpoint(workplace / "weights/start")[1].tensors
    saved = check_start(workplace, start)

    released = ["--to", "hf-deepseek", "--tokenizer", "tokenizer.model"]
    run_tool("convert_checkpoint", ["weights/start", "deepseek-vl-7b-chat", *released])
    commands = readme_commands("convert_checkpoint")
    assert len(commands) == 4
    for arguments in commands:
        run_tool("convert_checkpoint", arguments)
    for arguments in readme_commands("inspect_checkpoint"):
        run_tool("inspect_checkpoint", arguments)
    for folder in ("weights/chat", "ranks"):
        converted = open_checkpoint(workplace / folder)[1].tensors
        assert [name for name, tensor in start.items() if not torch.equal(converted[name].read(), tensor.read())] == []
    exported = transformers.DeepseekVLForConditionalGeneration.from_pretrained(workplace / "export").state_dict()
    for theirs, ours in (("lm_head.weight", "last_stage.head.weight"), *ADAPTOR):
        assert torch.equal(exported[theirs], saved[ours].read())
