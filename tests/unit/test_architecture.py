"""The rules that hold the folders together, read from the import statements.

Imports point one way (kernels <- ops <- model <- parallel <- training <- train), and a few names have one home.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megavl"

ALLOWED = {
    "config": set(),
    "data": {"config", "data"},
    "ops": {"config", "kernels"},
    "model": {"config", "data", "ops", "model"},
    "parallel": {"config", "data", "ops", "model", "parallel"},
    "checkpoint": {"config", "data", "model", "parallel", "training", "checkpoint"},
    "training": {"config", "data", "ops", "model", "parallel", "checkpoint", "evaluate", "training", "recipe"},
    "recipe": {"config"},
    "validate": {"config"},
    "generate": {"config", "data", "model", "parallel", "training", "checkpoint", "generate"},
    "evaluate": {"config", "data", "model", "parallel", "training", "checkpoint", "generate", "evaluate"},
    "planning": {"config", "data", "ops", "model", "parallel", "training", "recipe", "validate", "planning"},
    "train": {
        "config",
        "data",
        "ops",
        "model",
        "parallel",
        "planning",
        "training",
        "checkpoint",
        "evaluate",
        "recipe",
        "validate",
    },
}
"""Station -> the stations it may import. `data` gives `MicroBatch` to those above it and imports none of them."""


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.read_text().strip())


def imported(tree: ast.AST) -> Iterator[str]:
    """Full dotted names that a module imports, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def station(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    if path.parent == PACKAGE and path.name == "__init__.py":
        return
    names = [n.split(".") for n in imported(ast.parse(path.read_text())) if n.startswith("megavl.")]
    forbidden = sorted({".".join(n) for n in names if n[1] not in ALLOWED[station(path)]})
    assert not forbidden, f"{station(path)} must not import {forbidden}"


def users_of(name: str, folder: Path = PACKAGE) -> set[str]:
    """Files whose imports or attribute accesses end in `name`."""
    found = set()
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        parts = {part for n in imported(tree) for part in n.split(".")}
        if name in attributes | parts:
            found.add(str(path.relative_to(ROOT)))
    return found


def test_one_home_of_parallel_state():
    assert users_of("parallel_state") <= {"megavl/parallel/groups.py"}


def test_one_importer_of_kernels():
    """`recipe.kernels` is a field; the package is what is meant, also where its name is put together."""
    named = {str(p.relative_to(ROOT)) for p in modules() if "megavl.kernels" in code_of(p)}
    assert named == {"megavl/ops.py"}


def test_kernels_go_by_the_name_of_the_package():
    """A public package is called `kernels` as well; from the root, that name would find our folder and hide it."""
    import megavl.kernels

    assert [Path(path).resolve() for path in megavl.kernels.__path__] == [ROOT / "kernels"]
    assert (ROOT / "pyproject.toml").exists()  # without it, pip's editable installs do not map the folder
    for folder in ("megavl", "kernels", "tools", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert "kernels" not in names, path


def code_of(path: Path) -> str:
    """A file without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.unparse(tree)


def test_one_maker_of_transformer_config():
    calls = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "TransformerConfig"
    }
    assert calls == {"megavl/model/build.py"}


def test_model_files_know_no_ranks():
    assert {p for p in users_of("distributed") if p.startswith("megavl/model/")} == set()


def test_nothing_imports_tools_examples_or_tests():
    for path in PACKAGE.rglob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            assert name.split(".")[0] not in {"tools", "examples", "tests"}, f"{path} imports {name}"


def test_readme_tree_names_every_file():
    """The README shows the tree with a line per file; it must be true."""
    readme = (ROOT / "README.md").read_text()
    for path in modules() + sorted((ROOT / "tools").glob("*.py")):
        if path.name != "__init__.py":
            assert path.name in readme, f"{path.relative_to(ROOT)} has no line in the README's tree"


def test_a_skip_for_an_unknown_reason_is_a_failure(request: pytest.FixtureRequest):
    """Otherwise a part of the tests could be switched off unseen."""
    ours = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "ALLOWED_SKIPS"))
    for reason, outcome in (("no CUDA device", "skipped"), ("2 GPU for 4 ranks", "skipped"), ("flaky", "failed")):
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("a.py", 1, f"Skipped: {reason}"))
        assert ours.refuse_unknown_skip(report).outcome == outcome
    assert "flaky" in report.longrepr
