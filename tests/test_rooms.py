"""The import law of docs/design.md, read from the code with `ast`: a room imports only rooms above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = "autopar_solver core cluster sharding stages program memory report trace runtime api models io"
ROOMS = [*ABOVE.split(), "serve", "swarm", "bench", "cli"]
OUTSIDE = {
    "jax": {"trace", "runtime", "api", "models", "io", "swarm/server", "bench"},
    "ray": {"runtime/ray_backend"},
    "cvxpy": {"autopar_solver"},
    "highspy": {"autopar_solver"},
}

GROUPS = {"sharding": ["options region pins text", "ways", "choices", "memory", "problem", "limit"]}
"""Inside a room: files that all may import, then groups, each of which imports only those before it."""


def files() -> list[Path]:
    return sorted([*(ROOT / "autopar").rglob("*.py"), *(ROOT / "solver" / "autopar_solver").rglob("*.py")])


def room_of(path: Path) -> str:
    """The room a file belongs to, "" for the facade."""
    parts = path.with_suffix("").relative_to(ROOT).parts
    if parts[0] == "solver":
        return "autopar_solver"
    return "" if parts[1] == "__init__" else parts[1]


def imports(source: str) -> set[str]:
    """Full dotted names of everything a file imports, wherever it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaches(path: Path, source: str) -> list[str]:
    """What in this file breaks the law, in words."""
    room, place, wrong = room_of(path), "/".join(path.with_suffix("").parts), list[str]()
    for name in sorted(imports(source)):
        top, *rest = name.split(".")
        target = (
            "autopar_solver" if top == "autopar_solver" else rest[0] if top == "autopar" and rest else None
        )
        if target in ROOMS and room and ROOMS.index(target) > ROOMS.index(room):
            wrong.append(f"{room} imports {target}, a room below it")
        top = "jax" if top == "jaxlib" else top
        if top in OUTSIDE and room and not any(f"/{r}" in f"/{place}/" for r in OUTSIDE[top]):
            wrong.append(f"{room} imports {top}, which belongs to {', '.join(sorted(OUTSIDE[top]))}")
    return wrong


@pytest.mark.parametrize("room", GROUPS)
def test_a_group_imports_only_groups_before_it(room: str):
    first, *groups = GROUPS[room]
    for number, group in enumerate(groups):
        allowed = {*first.split(), *groups[: number + 1]}
        for path in (ROOT / "autopar" / room / group).glob("*.py"):
            names = [name.split(".") for name in imports(path.read_text())]
            inside = {each[2] for each in names if each[:2] == ["autopar", room]}
            assert inside <= allowed, f"{path} imports {sorted(inside - allowed)}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path: Path):
    assert not breaches(path, path.read_text())


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("autopar/core/graph.py", "import jax"),
        ("autopar/sharding/plan.py", "from autopar.trace import capture"),
        ("autopar/stages/plan.py", "import highspy"),
        ("autopar/cluster/cluster.py", "from autopar import runtime"),
        ("autopar/runtime/inprocess.py", "def f():\n    import ray"),
        ("solver/autopar_solver/solve.py", "import autopar.core.graph"),
    ],
)
def test_the_law_notices_a_forbidden_import(place: str, line: str):
    assert breaches(ROOT / place, line)


def test_core_and_the_facade_do_not_import_jax():
    rooms = "autopar, autopar.core.plan, autopar.cluster, autopar.program"
    code = f"import sys, {rooms}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_room_is_a_package_with_a_docstring():
    for folder in (p for p in (ROOT / "autopar").iterdir() if p.is_dir() and any(p.glob("*.py"))):
        init = folder / "__init__.py"
        assert init.exists() and ast.get_docstring(ast.parse(init.read_text())), (
            f"{folder} says nothing of itself"
        )
