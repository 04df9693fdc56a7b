"""Recipe files, overrides by name, and the resolved recipe as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from megavl.recipe import load_recipe, load_recipe_json, override, parse_command_line, save_recipe, to_json

FILE = """
import dataclasses
from megavl.config import *
from megavl.model.sizes import SIZES

def recipe() -> Recipe:
    text = SourceConfig(name="text", path="a", modality="language", share=0.7)
    images = SourceConfig(name="images", path="b", modality="multimodal", share=0.3)
    return Recipe(
        run_dir="runs/x", model=SIZES["@"], parallel=ParallelConfig(),
        data=DataConfig(tokenizer="t", sources=(text, images), seq_length=128),
        stage=StageConfig(number=2, steps=10, global_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2),
    )
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.py"
    path.write_text(FILE.replace("@", "tiny_hybrid"))
    return path


def test_overrides_reach_nested_sections(recipe_file: Path) -> None:
    options = {
        "--model.decoder.layers": "3",
        "--model.sam.window": "2",
        "--model.sam.global_layers": "0 2",
        "--data.sources.0.share": "0.25",
        "--data.sources.1.share": "0.75",
        "--parallel.sequence": "True",
        "--optim.vision_lr": "3e-4",
        "--optim.schedule": "multistep",
        "--run_dir": "elsewhere",
    }
    args = [word for name, value in options.items() for word in (name, *value.split())]
    made = parse_command_line([str(recipe_file), *args])
    assert made.model.decoder.layers == 3
    assert made.model.sam is not None
    assert (made.model.sam.window, made.model.sam.global_layers) == (2, (0, 2))
    assert [s.share for s in made.data.sources] == [0.25, 0.75]
    assert (made.parallel.sequence, made.optim.vision_lr, made.optim.schedule) == (True, 3e-4, "multistep")
    assert made.run_dir == "elsewhere"
    assert made.stage == load_recipe(recipe_file).stage


def test_no_tower_is_not_a_subcommand(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(FILE.replace("@", "tiny"))
    made = override(load_recipe(tmp_path / "r.py"), ["--model.decoder.layers", "2", "--optim.vision_lr", "None"])
    assert made.model.sam is None
    assert made.model.decoder.layers == 2


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("--model.decoder.layer", "--model.decoder.layers"),
        ("--paralel.tensor", "--parallel.tensor"),
        ("--data.sources.2.share", "--data.sources.1.share"),
        ("--optim.learning-rate", "--optim."),
    ],
)
def test_unknown_field(recipe_file: Path, wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="is not a field of the recipe") as caught:
        override(load_recipe(recipe_file), [wrong, "3"])
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_value_and_stray_word(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--stage.steps", "many"], ["--stage.number", "7"], ["stray"]):
        with pytest.raises(SystemExit) as caught:
            override(load_recipe(recipe_file), args)
        assert caught.value.code == 2
    assert "steps" in capsys.readouterr().err


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_recipe(tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty.py.*no function"):
        load_recipe(tmp_path / "empty.py")
    (tmp_path / "wrong.py").write_text("def recipe(): return 3")
    with pytest.raises(ValueError, match="int instead of Recipe"):
        load_recipe(tmp_path / "wrong.py")
    with pytest.raises(ValueError, match="first argument"):
        parse_command_line(["--stage.steps", "3"])


@pytest.mark.parametrize("size", ["tiny", "tiny_hybrid"])
def test_json_round_trip(tmp_path: Path, size: str) -> None:
    (tmp_path / "r.py").write_text(FILE.replace("@", size))
    made = load_recipe(tmp_path / "r.py")
    save_recipe(made, tmp_path / "run" / "recipe.json")
    again = load_recipe_json(tmp_path / "run" / "recipe.json")
    assert again == made
    assert hash(again) == hash(made)  # tuples came back as tuples
    assert load_recipe(tmp_path / "run" / "recipe.json") == made
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.json"]


def test_json_of_another_version(tmp_path: Path, recipe_file: Path) -> None:
    content = json.loads(to_json(load_recipe(recipe_file)))
    content["stage"]["colour"] = 3
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="colour"):
        load_recipe_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json"):
        load_recipe_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ('"cosine"', '"multi_step"', r"optim.schedule is 'multi_step', it can be 'cosine', 'multistep', 'constant'"),
        ("steps=10", "steps=10.5", r"stage.steps is 10.5, not of type int"),
        ("steps=10", 'steps="10"', r"stage.steps is '10', not of type int"),
        ("number=2", "number=4", r"stage.number is 4, it can be 0, 1, 2, 3"),
        ("number=2", "number=True", r"stage.number is True, it can be 0, 1, 2, 3"),
        ("lr=1e-3", 'lr=float("nan")', r"optim.lr is nan, not a finite number"),
        ("share=0.3", "share=None", r"data.sources.1.share is None, not of type float"),
        ("(text, images)", "[text, images]", r"data.sources is \[SourceConfig.*, not a tuple"),
        ('SIZES["@"]', '"tiny"', r"model is 'tiny', not a ModelConfig"),
    ],
)
def test_values_of_other_types(tmp_path: Path, right: str, wrong: str, sentence: str) -> None:
    """Dataclasses take anything, and a misspelt choice would be taken for the one that code tests last."""
    assert right in FILE
    (tmp_path / "r.py").write_text(FILE.replace(right, wrong).replace("@", "tiny"))
    with pytest.raises(ValueError, match=rf"r.py: {sentence}$"):
        load_recipe(tmp_path / "r.py")


@pytest.mark.parametrize(
    ("section", "value", "sentence"),
    [
        ("", [], r"the recipe is \[\], not a Recipe"),
        ("model", 3, r"model is 3, not a ModelConfig"),
        ("data", None, r"data is None, not a DataConfig"),
        ("background", [1, 2], r"model.background is \(1, 2\), not a tuple of 3 values"),
        ("sources", {"a": 1}, r"data.sources is \{'a': 1\}, not a tuple"),
    ],
)
def test_json_of_other_types(tmp_path: Path, recipe_file: Path, section: str, value: Any, sentence: str) -> None:
    content = json.loads(to_json(load_recipe(recipe_file)))
    for holder in (content, content["model"], content["data"]):
        if section in holder:
            holder[section] = value
    (tmp_path / "a.json").write_text(json.dumps(content if section else value))
    with pytest.raises(ValueError, match=rf"a.json: {sentence}$"):
        load_recipe_json(tmp_path / "a.json")


def test_json_names_a_field_once(tmp_path: Path, recipe_file: Path) -> None:
    text = to_json(load_recipe(recipe_file)).replace('"steps": 10', '"steps": 10, "steps": 20')
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json: the field steps occurs twice"):
        load_recipe(tmp_path / "a.json")


def test_not_a_number_on_the_command_line(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"the command line: optim.clip is inf, not a finite number"):
        override(load_recipe(recipe_file), ["--optim.clip", "inf"])
