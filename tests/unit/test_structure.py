"""The structure of the package: imports point downwards, without circles, and no room is crowded."""

import ast

import pytest

from tests.checkout import ROOT

PACKAGE = "deberta_kernels"
# From the bottom to the top. A room may import those below it, and none beside it.
FLOORS = (
    {"types", "dtypes", "env", "backends", "__init__"},
    {"dropout", "notices", "position", "torch_state"},
    {"checks", "native"},
    {"masks"},
    {"impl"},
    {"proof"},
    {"dispatch", "flops"},
    {"ops", "linear"},
    {"api"},
    {"models"},
    {"integrations", "modules", "info", "testing", "warmup"},
    {"demo"},
    {"bench"},
    {"__main__"},
)
MOST_FILES = 15
MOST_LINES = 400
MOST_LINES_OF_KERNELS = 600


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "results" not in path.parts)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in python_files(PACKAGE)}


def imported(name):
    """The modules of the package that a module imports, wherever in its code, but for type checkers' sake."""
    path, found = MODULES[name], set()
    home = (name if path.stem == "__init__" else name.rpartition(".")[0]).split(".")
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*home[: len(home) - node.level + 1], node.module or ""] if node.level else [node.module])
            base = base.rstrip(".")
            found |= {f"{base}.{x.name}" if f"{base}.{x.name}" in MODULES else base for x in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return {x for x in found if x in MODULES and x not in (name, PACKAGE)}


def room_of(name):
    return ([*name.split("."), "__init__"])[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(name)
    up = {x for x in imported(name) if room_of(x) != room and floors[room_of(x)] >= floors[room]}
    assert not up


def test_no_imports_run_in_circles():
    graph, known_free = {name: imported(name) for name in MODULES}, set()

    def follow(name, way):
        assert name not in way, " -> ".join([*way, name])
        for below in graph[name] - known_free:
            follow(below, [*way, name])
        known_free.add(name)

    for name in graph:
        follow(name, [])


def test_no_folder_is_crowded():
    files = python_files(PACKAGE, "benchmarks", "tools")
    counts = {folder: sum(path.parent == folder for path in files) for folder in {path.parent for path in files}}
    assert max(counts.values()) <= MOST_FILES, max(counts, key=counts.get)


def most_lines(path):
    is_kernel = path.suffix != ".py" or path.parent.name == "kernels"
    return MOST_LINES_OF_KERNELS if is_kernel else MOST_LINES


@pytest.mark.parametrize("folder", [PACKAGE, "benchmarks", "tools", "tests", "csrc", "examples"])
def test_no_file_is_long(folder):
    code = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    assert code
    assert {path for path in code if path.read_text().count("\n") > most_lines(path)} == set()
