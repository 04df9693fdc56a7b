"""The benchmark command at a tiny size, and whether every row of its matrix can be asked for."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megavl.model.sizes import SIZES
from megavl.parallel.validate import check_layout
from megavl.recipe import parse_command_line
from megavl.training.flops import StepCounts, step_flops
from megavl.validate import validate

ROOT = Path(__file__).parents[2]
ALONE = ["--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.sequence", "False", "--parallel.layout", ""]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "tools" / "bench_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench(tool: ModuleType, path: Path, *arguments: str) -> int:
    few = ["--micro-batches", "2", "--warm-up", "1", "--steps", "3", "--csv", str(path), "--parallel.device", "cpu"]
    recipe = str(ROOT / "examples" / "quickstart" / "stage2.py")
    return tool.main([recipe, "--model", "tiny", *few, *ALONE, *arguments])


def test_rows(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert bench(tool, path) == 0
    ahead = ("--parallel.vision", "split_model")  # which counts the images of a whole step
    assert bench(tool, path, "--images", "1", "--parallel.recompute", "full", *ahead) == 0
    with path.open() as file:
        text, image = list(csv.DictReader(file))
    assert (text["model"], text["layout"], text["kernels"], text["mfu"], text["images"]) == (
        "tiny",
        "dp1",
        "none",
        "",
        "0",
    )
    assert (text["recompute"], image["recompute"]) == ("none", "full")
    for row, images in ((text, 0), (image, int(image["images"]))):
        tokens, seconds = int(row["tokens"]), float(row["step_ms"]) / 1e3
        length = tokens * int(image["images_per_row"]) // max(1, int(image["images"]))
        counts = StepCounts(images=images, tokens=tokens, squared_lengths=tokens * length, logits=tokens)
        trained = ("sam_adaptor", "aligner", "decoder")
        expected = sum(step_flops(SIZES["tiny"], trained, counts).values()) / seconds / 1e12
        assert float(row["tflops"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / seconds, rel=1e-4)
        assert float(row["p10_ms"]) <= float(row["step_ms"]) <= float(row["p90_ms"])
    assert float(image["vision_ms"]) > 0 == float(text["vision_ms"])
    assert "MFU unknown" in capsys.readouterr().out


def test_bad_input(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    other.write_text("device,speed\n")
    assert bench(tool, other, "--images", "400") == 1
    assert "400 images of" in capsys.readouterr().err
    assert bench(tool, other) == 1
    assert "other columns" in capsys.readouterr().err
    assert other.read_text() == "device,speed\n"


def test_matrix(tool: ModuleType) -> None:
    """Every row parses, fits one rank, and no two are alike."""
    rows = [tuple(row) for row in tool.matrix()]
    assert len(set(rows)) == len(rows) == 3 * 8 + 4
    layers = set()
    for recipe, _, model, _, images, *rest in rows:
        parsed = tool.resize(parse_command_line([str(ROOT / recipe), *rest]), model, rest)
        layers.add((model, parsed.stage.number, parsed.model.decoder.layers))
        assert parsed.data.seq_length == 4096
        assert validate(parsed) == []
        assert check_layout(parsed, 1) == []
        assert int(images) in (0, 4)
    assert layers == {("1.3b", 2, 24), ("1.3b_hybrid", 2, 24), ("7b", 2, 8), ("7b", 1, 30)}
