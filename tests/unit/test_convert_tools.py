"""The two commands: what they print for a small checkpoint, and their exit status."""

import sys
from pathlib import Path

import pytest
from convert_samples import HYBRID, random_contents
from safetensors.torch import load_file, save_file

from megavl.checkpoint.convert.formats import WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.model.sizes import count_parameters

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint
import inspect_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    DEEPSEEK.write(random_contents(HYBRID), folder, WriteOptions(), lambda count: None)
    return folder


def test_dry_run_shows_first_and_last_slices(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "t"
    options = ["--to", "megatron-ranks", "--pipeline", "3", "--layout", "1,2,0", "--tensor", "2", "--dry-run"]
    assert convert_checkpoint.main([str(source), str(target), *options, "--show", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not target.exists()
    assert lines[0].startswith("hf-deepseek -> megatron-ranks, ")
    assert lines[0].endswith(" bytes in 7 files")  # six ranks and the unused tensors
    assert len(lines) == 6
    assert " more ..." in lines[3]
    assert "mp_rank_00_000" in lines[1]
    assert lines[-1].endswith("-> unused.safetensors")


def test_convert_then_inspect(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "t"
    assert convert_checkpoint.main([str(source), str(target), "--to", "megatron-ranks", "--tensor", "2"]) == 0
    assert "verified" in capsys.readouterr().out
    assert inspect_checkpoint.main([str(target)]) == 0
    shown = capsys.readouterr().out
    assert "megatron-ranks (tensor 2, pipeline 1" in shown
    assert f"{count_parameters(HYBRID)['siglip']:,}" in shown
    assert "bfloat16" in shown
    assert inspect_checkpoint.main([str(source), str(target)]) == 0
    assert "all the same" in capsys.readouterr().out


def test_the_first_difference_is_named(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "t"
    assert convert_checkpoint.main([str(source), str(target), "--to", "hf-deepseek", "--no-verify"]) == 0
    state = load_file(target / "model.safetensors")
    state["language_model.model.layers.1.self_attn.k_proj.weight"][2, 3] += 1
    state["language_model.model.norm.weight"] *= -1
    save_file(state, target / "model.safetensors")
    capsys.readouterr()
    assert inspect_checkpoint.main([str(source), str(target)]) == 1
    shown = capsys.readouterr().out
    assert "2 of " in shown
    assert "first decoder.layers.1.self_attention.linear_qkv.weight: 1 of " in shown


def test_one_sentence_for_what_cannot_be(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.main([str(source / "absent"), str(source.parent / "t"), "--to", "megatron-dist"]) == 1
    assert capsys.readouterr().err == f"convert_checkpoint: {source / 'absent'}: no such folder\n"
    layout = ["--to", "megatron-ranks", "--tensor", "4"]
    assert convert_checkpoint.main([str(source), str(source.parent / "t"), *layout]) == 1
    assert "4" in capsys.readouterr().err
    assert inspect_checkpoint.main([str(source.parent)]) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--to", "megatron-dist", "--tensor", "2"], "--tensor 2 is for --to megatron-ranks, not --to megatron-dist"),
        (["--to", "hf-transformers", "--layout", "1,2"], "--layout 1,2 is for --to megatron-ranks"),
        (["--to", "megatron-ranks", "--names", "4.56"], "--names 4.56 is for --to hf-transformers"),
    ],
)
def test_options_of_another_format(
    source: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert convert_checkpoint.main([str(source), str(source.parent / "t"), *options]) == 1
    assert sentence in capsys.readouterr().err
    assert not (source.parent / "t").exists()
