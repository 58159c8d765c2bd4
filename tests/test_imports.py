"""Imports run one way, downward, and importing vitfast stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
REPOSITORY = PACKAGE.parent

# A part may import itself and the parts below it, nothing above and nothing beside it.
LAYERS = [
    {"cli"},
    {"train", "bench"},
    {"analysis", "hessian"},
    {"models"},
    {"nn"},
    {"functional"},
    {"ops"},
    {"kernels", "_C"},
]
LAYER = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
FREE = {"_version", "reference"}  # import nothing of vitfast, so all may import them
ROOT = {
    "__init__",
    "__main__",
}  # the package itself: gathers public names, which only the command line may take from it


def source_files() -> dict[str, Path]:
    """Module name -> file, of the package and of the kernels, which are installed as vitfast.kernels."""
    kernels = REPOSITORY / "kernels"
    files = {path: path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    files |= {path: Path("kernels") / path.relative_to(kernels) for path in kernels.glob("*.py")}
    return {".".join(("vitfast", *relative.with_suffix("").parts)): path for path, relative in files.items()}


def imported_modules(name: str, source: str) -> set[str]:
    """Every module of vitfast that the module ``name`` imports, anywhere in its code, by absolute name."""
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vitfast import nn` imports the module vitfast.nn, `from vitfast.nn import X` the module vitfast.nn
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "vitfast" else {module}
    return {module for module in found if module.split(".")[0] == "vitfast"}


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def forbidden_imports(name: str, source: str) -> list[str]:
    part = part_of(name)
    targets = {module: part_of(module) for module in sorted(imported_modules(name, source))}
    return [f"{name} imports {module}" for module, target in targets.items() if not may_import(part, target)]


def may_import(part: str, target: str) -> bool:
    if part == target or part in ROOT:
        return True
    if part in FREE:
        return False
    if target in LAYER:
        return LAYER[target] > LAYER[part]
    return target in FREE or part == "cli"


MODULES = source_files()


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name):
    assert part_of(name) in LAYER.keys() | FREE | ROOT, f"{name} has no place in the order of imports"
    assert forbidden_imports(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("vitfast.nn.attention", "from vitfast.functional import window_attention", True),
        ("vitfast.nn.attention", "from vitfast import functional, reference", True),
        ("vitfast.nn.attention", "from .base import Base", True),
        ("vitfast.functional", "import vitfast.nn", False),
        ("vitfast.functional", "def f():\n    from .models import create_model", False),
        ("vitfast.train.loop", "from vitfast.analysis import calibration", True),
        ("vitfast.analysis.calibration", "from vitfast.train import data", False),
        ("vitfast.bench.runner", "from vitfast.train import data", False),
        ("vitfast.cli.models", "from vitfast import create_model", True),
        ("vitfast.train.loop", "from vitfast import create_model", False),
        ("vitfast.reference.window_attention", "from vitfast.ops import backend", False),
        ("vitfast.reference.window_attention", "from ..functional import window_attention", False),
        ("vitfast.kernels.window_attention", "from vitfast import _C", False),
        ("vitfast.ops.window_attention", "from vitfast.kernels import window_attention", True),
    ],
)
def test_the_check_itself(name, source, allowed):
    assert (forbidden_imports(name, source) == []) is allowed


def test_import_is_light():
    """What only some calls need is imported by them: Triton, torch's compiler, the packages of the extras."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import vitfast\n"
        "heavy = {'triton', 'torch._dynamo', 'matplotlib', 'sklearn', 'tqdm', 'PIL', 'scipy'}\n"
        "heavy |= {'timm', 'torchvision', 'transformers'}\n"
        "print(sorted(heavy & (sys.modules.keys() - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
