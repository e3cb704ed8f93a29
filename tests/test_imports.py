"""Imports point one way, and what is heavy stays out until somebody uses it."""
import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"scgpt", "data_pipeline", "pretrain", "launch"}
HEAVY = ("torch", "ray", "deepspeed", "wandb", "datasets", "anndata", "matplotlib")

# What a package may import: of ours, and of the heavy ones (anything else must be light).
MAY_IMPORT = {
    "scgpt": {"scgpt"},
    "data_pipeline": {"scgpt", "data_pipeline"},
    "pretrain": {"scgpt", "pretrain"},
    "launch": PACKAGES,
}
MUST_NOT_IMPORT = {
    "scgpt": {"ray", "deepspeed", "wandb", "anndata"},
    "data_pipeline": {"torch", "deepspeed", "wandb"},
    "pretrain": {"ray", "anndata"},
    "launch": set(),
}
# Inside scgpt: a layer imports layers below it, at module level as inside functions.
LAYERS = (
    {"counted", "errors", "stderr", "process", "allocator", "words", "files", "config", "rng", "vocab"},
    {"data"},
    {"collate"},
    {"model", "loss"},
    {"tokenizer", "preprocess", "data_collator", "utils", "__init__"},   # upstream's import paths
)
# Torch at module level: only here (and inside functions anywhere in scgpt).
TORCH_MODULES = ("scgpt/model/", "scgpt/loss.py")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, with lines; `from a import b` gives `a` and `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for block in ast.walk(tree)
              if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(block)
              for node in ast.walk(block)}
    for node in ast.walk(tree):
        if top_level_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield str(node.module), node.lineno
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def layer_of(dotted: str) -> int | None:
    parts = dotted.split(".")
    if parts[0] != "scgpt":
        return None
    name = parts[1] if len(parts) > 1 else "__init__"
    return next((index for index, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_lies_below_them(package: str):
    forbidden = (PACKAGES - MAY_IMPORT[package]) | MUST_NOT_IMPORT[package]
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}"
             for path in modules(package) for name, line in imports(path) if name.split(".")[0] in forbidden]
    assert not wrong, "\n".join(wrong)


def test_layers_of_scgpt_import_only_lower_layers():
    wrong = []
    for path in modules("scgpt"):
        own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert own is not None, f"{path.relative_to(ROOT)} belongs to no layer: add it to LAYERS"
        for name, line in imports(path):
            below = layer_of(name)
            if name != "scgpt" and below is not None and below > own:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_at_module_level_only_by_the_model_and_the_losses():
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path in modules("scgpt")
             for name, line in imports(path, top_level_only=True)
             if name.split(".")[0] == "torch" and not str(path.relative_to(ROOT)).startswith(TORCH_MODULES)]
    assert not wrong, "\n".join(wrong)


def test_only_ray_workers_imports_ray():
    wrong = [f"{path.relative_to(ROOT)}:{line}" for package in sorted(PACKAGES) for path in modules(package)
             for name, line in imports(path) if name.split(".")[0] == "ray"
             and path != ROOT / "data_pipeline" / "ray_workers.py"]
    assert not wrong, "\n".join(wrong)


def test_no_module_beside_train_py_hides_an_installed_package():
    """`pretrain/train.py` runs as a script: its folder comes first on sys.path."""
    import importlib.metadata
    names = {path.stem for path in (ROOT / "pretrain").glob("*.py")} - {"__init__"}
    taken = names & (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()))
    assert not taken


def launch_modules() -> list[str]:
    return [f"launch.{path.stem}" for path in modules("launch") if path.stem != "__init__"]


def loaded_by(statement: str) -> set[str]:
    """The heavy packages in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
                         cwd=ROOT, env=os.environ)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["scgpt", "scgpt.data", "scgpt.collate", "scgpt.model.config", "scgpt.data_collator",
                                    "scgpt.preprocess", "scgpt.utils", "scgpt.tokenizer", *launch_modules()])
def test_importing_it_loads_nothing_heavy(module: str):
    assert loaded_by(f"import {module}") == set()


@pytest.mark.parametrize("package", ["data_pipeline", "pretrain"])
def test_no_module_of_it_loads_what_the_package_must_not(package: str):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
             for path in modules(package) if path.stem != "train"]
    assert not loaded_by("\n".join(f"import {name}" for name in names)) & MUST_NOT_IMPORT[package]
