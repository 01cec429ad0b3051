"""The order of the folders: each imports only from those above it, and no module from below."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rayrm

ROOT = Path(rayrm.__file__).parent

# From the ground up. The public names come last: they are of all floors.
FLOORS = [
    "errors",
    "files",
    "config",
    "packing",
    "gauges",
    "data",
    "rows",
    "text",
    "model",
    "evaluation",
    "training",
    "serving",
    "integrations",
    "commands",
    "__init__",
]


def imports(source: str) -> set[str]:
    """Modules of rayrm that the source imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            inside = {f"{module}.{name.name}" for name in node.names}
            found |= {name if is_module(name) else module for name in inside}
    return {name for name in found if name.partition(".")[0] == "rayrm"}


def is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def floor(module: str) -> str:
    return module.removeprefix("rayrm").lstrip(".").partition(".")[0] or "__init__"


def arrows() -> dict[str, set[str]]:
    """Every module and what it imports of rayrm."""
    files = {file.relative_to(ROOT.parent).with_suffix(""): file for file in ROOT.rglob("*.py")}
    return {
        ".".join(part for part in path.parts if part != "__init__"): imports(file.read_text())
        for path, file in files.items()
    }


def arrows_back(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others - {"rayrm"})
        if FLOORS.index(floor(other)) > FLOORS.index(floor(module))
    ]


def test_every_folder_has_its_floor() -> None:
    assert {floor(module) for module in arrows()} <= set(FLOORS)


def test_no_folder_imports_from_one_below_it() -> None:
    assert arrows_back(arrows()) == []


def test_modules_import_each_other_in_no_circle() -> None:
    # The public names are lazy: whoever imports rayrm imports none of them.
    graph = {module: others - {"rayrm"} for module, others in arrows().items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "source",
    [
        "from rayrm.training.loop import Rank",
        "import rayrm.training.loop",
        "from rayrm.training import loop",
        "def f():\n    from rayrm.training.loop import Rank",
        "if TYPE_CHECKING:\n    from rayrm.training.loop import Rank",
    ],
)
def test_an_arrow_back_is_found_wherever_it_stands(source: str) -> None:
    assert arrows_back({"rayrm.model.net": imports(source)}) == [
        "rayrm.model.net imports rayrm.training.loop"
    ]
