"""The layers of the package: which may import which, and no circle. Imports are read, not run."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kdkernels"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Modules of the package that this one imports anywhere: at the top, late, or for types."""
    path = MODULES[module]
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]
        name = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{name}.{alias.name}"
            found.add(inner if inner in MODULES else name)
    return found - {module}


#: A package's face imports its modules and they do not import it: only what it stands for counts.
ARROWS = {module: imports(module) for module in MODULES}


def layer(module: str) -> str:
    """The sub-package that is a layer of its own; "" for the loss itself."""
    _, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return first if first in ("losses", "training", "commands") else ""


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(ARROWS[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


@pytest.mark.parametrize(
    ("upper", "lower"),
    [
        ("", {""}),
        ("losses", {"", "losses"}),
        ("training", {"", "losses", "training"}),
        ("commands", {"", "losses", "training", "commands"}),
    ],
)
def test_a_layer_imports_what_is_below_it(upper: str, lower: set[str]) -> None:
    for module, imported in ARROWS.items():
        if layer(module) == upper and module != "kdkernels.__main__":  # which runs the commands
            assert {layer(other) for other in imported} <= lower, module


def test_transformers_is_for_training_and_commands() -> None:
    for module, path in MODULES.items():
        if layer(module) in ("", "losses"):
            assert "transformers" not in {
                name.partition(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            }, module


def test_every_folder_says_what_it_is_for() -> None:
    for path in MODULES.values():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "examples").glob("*.py")), ids=str)
def test_examples_import_what_there_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdkernels"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
