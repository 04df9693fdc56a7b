"""A released model through all stages and back: what training does not use is there again, bit for bit.

The released form has tensors that no forward pass reads and a tokenizer; a run has neither in its model.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_run import lines

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import FormatName, WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.run import Request, convert
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.hf_names import unused_names
from megavl.recipe import load_recipe
from megavl.train import main as train

FILES = {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}


def write_released(recipe: Path, folder: Path) -> list[str]:
    """The recipe's model with random weights in the released form; returns the names of its unused tensors."""
    model, folder_of_files = load_recipe(recipe).model, folder.with_name("files")
    folder.mkdir()
    folder_of_files.mkdir()
    (folder_of_files / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder_of_files / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (folder_of_files / "tokenizer.model").write_bytes((recipe.parent / "tokenizer.model").read_bytes())
    tensors = {name: in_memory(0.05 * torch.randn(shape), name) for name, shape in full_shapes(model).items()}
    unused = {name: in_memory(torch.randn(3, 5).bfloat16(), name) for name in unused_names(model)}
    files = {path.name: path for path in folder_of_files.iterdir()}
    contents = Contents(model=model, tensors=tensors, unused=unused, files=files)
    DEEPSEEK.write(contents, folder, WriteOptions(), lambda count: None)
    return list(unused)


def converted(source: Path, target: Path, to: FormatName) -> Path:
    convert(Request(source=source, target=target, to=to), lambda what, total: nullcontext(lambda count: None))
    return target


def run_stage(recipe: Path, number: int, init_from: Path, run_dir: Path, *options: str) -> None:
    stage = ("--stage.number", str(number), "--checkpoint.init_from", str(init_from), "--run_dir", str(run_dir))
    assert train([str(recipe), *stage, "--data.workers", "0", *options]) == 0


@pytest.mark.usefixtures("in_process")
def test_released_model_trained_through_all_stages(recipe: Path, tmp_path: Path) -> None:
    unused = write_released(recipe, tmp_path / "released")
    start = converted(tmp_path / "released", tmp_path / "start", "megatron-dist")
    in_background = ("--checkpoint.every_steps", "1", "--checkpoint.background", "True", "--checkpoint.keep", "1")
    run_stage(recipe, 1, start, tmp_path / "1", "--stage.steps", "2", *in_background)
    run_stage(recipe, 2, tmp_path / "1", tmp_path / "2", "--stage.steps", "1")
    os.rename(tmp_path / "1", tmp_path / "moved")
    run_stage(recipe, 2, tmp_path / "1", tmp_path / "2", "--stage.steps", "2")  # resumed
    assert [line["step"] for line in lines(tmp_path / "2")] == [0, 1]
    run_stage(recipe, 3, tmp_path / "2", tmp_path / "3", "--stage.steps", "1")

    original = load_file(tmp_path / "released" / "model.safetensors")
    for name in ("moved", "3"):
        export = converted(tmp_path / name, tmp_path / f"{name}_export", "hf-deepseek")
        found = load_file(export / "model.safetensors")
        assert found.keys() == original.keys()
        assert all(found[n].dtype == original[n].dtype and torch.equal(found[n], original[n]) for n in unused)
        assert any(not torch.equal(found[n], original[n]) for n in found)
        for file in FILES:
            assert (export / file).read_bytes() == (tmp_path / "files" / file).read_bytes()
    export = converted(tmp_path / "3", tmp_path / "export", "hf-transformers")
    report = transformers.AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)[1]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (export / "tokenizer.model").exists()


@pytest.mark.usefixtures("in_process")
def test_damaged_unused_tensors_stop_the_start(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_released(recipe, tmp_path / "released")
    start = converted(tmp_path / "released", tmp_path / "start", "megatron-dist")
    unused = start / "unused.safetensors"
    unused.write_bytes(unused.read_bytes()[:-1])
    options = ["--checkpoint.init_from", str(start), "--data.workers", "0", "--run_dir", str(tmp_path / "run")]
    assert train([str(recipe), *options]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megavl:")]
    assert len(told) == 1
    assert f"{unused}: tensors take" in told[0]
    assert not (tmp_path / "run" / "checkpoints").exists()
