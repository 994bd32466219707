"""The floors of the house: a room imports only from rooms below it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_lightning

ROOT = Path(sparse_lightning.__file__).parent

# Every module or folder directly under the package, and how high it stands. A room may import from
# itself and from lower floors; rooms of one floor, as policy and kernels, never see each other.
FLOORS = {
    "nm_pattern": -1,
    "history": 0,
    "interrupts": 0,
    "ranks": 0,
    "topology": 0,
    "masks": 0,
    "sharding": 0,
    "tables": 0,
    "arguments": 0,
    "files": 0,
    "names": 1,
    "kernels": 1,
    "policy": 1,
    "linear": 2,
    "copies": 3,
    "gathering": 3,
    "fusion": 4,
    "mlp": 3,
    "roles": 3,
    "swap_report": 3,
    "stepping": 3,
    "env": 4,
    "optimizer_state": 4,
    "selection": 4,
    "patching": 5,
    "savings": 5,
    "config": 6,
    "export": 6,
    "tracked_optimizer": 5,
    "diagnostics": 6,
    "followers": 6,
    "loading": 7,
    "sparsifier": 7,
    "inspection": 7,
    "integrations": 8,
    "observers": 8,
    "callbacks": 9,
    "bench": 3,
    "report": 9,
    "planning": 10,
    "cli": 11,
    "__init__": 12,  # the roof, which users enter by; no room does
}

# Who alone may import what comes from elsewhere, if not everyone may.
ONLY_IN = {
    "lightning": {"callbacks", "observers"},
    "lightning_fabric": {"callbacks", "observers"},
    "lightning_utilities": {"callbacks", "observers"},
    "pytorch_lightning": {"callbacks"},
    "rich": {"observers", "tables"},
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "wandb": {"observers"},
    "cupy": {"kernels"},
    "cupy_backends": {"kernels"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "safetensors": {"export"},
    "plotly": {"report"},
}


def rooms(package: Path) -> Iterator[tuple[str, Path]]:
    """Every source file, with the room it lies in."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).with_suffix("").parts[0], path


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, in functions and TYPE_CHECKING too."""
    folder = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(package: Path) -> list[str]:
    """What stands in the wrong place, one sentence each."""
    found = []
    present = {room for room, _ in rooms(package)}
    for room in sorted(present - set(FLOORS)):
        found.append(f"{room}: has no floor; give it one in FLOORS, above all that it imports")
    for room, path in rooms(package):
        for line, name in imports(path, package):
            where = f"{path.relative_to(package)}:{line}"
            top, _, rest = name.partition(".")
            if top != package.name:
                allowed = ONLY_IN.get(top)
                if allowed is not None and room not in allowed:
                    found.append(f"{where}: imports {top}; only {', '.join(sorted(allowed))} may")
                continue
            # A name that is no room, as in `from package import BlockTopology`, is the roof's.
            target = rest.partition(".")[0]
            target = target if target in present | set(FLOORS) else "__init__"
            if target == room or room not in FLOORS or target not in FLOORS:
                continue
            if FLOORS[target] >= FLOORS[room]:
                found.append(
                    f"{where}: imports {target} (floor {FLOORS[target]}) from {room} "
                    f"(floor {FLOORS[room]}); a room imports only from rooms below it"
                )
    return found


def test_rooms_import_only_from_rooms_below() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(["the floors are broken:", *found])


def test_the_table_lists_the_rooms_that_there_are() -> None:
    assert {room for room, _ in rooms(ROOT)} == set(FLOORS)


def test_architecture_md_has_the_same_floors() -> None:
    page = (ROOT.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (-?\d+) \| ((?:`[\w./]+` ?)+) \|", page, flags=re.M)
    named = {
        room.removesuffix(".py").removesuffix("/"): int(floor)
        for floor, rooms_of_row in rows
        for room in re.findall(r"`([^`]+)`", rooms_of_row)
    }
    assert named == {room: floor for room, floor in FLOORS.items() if room != "__init__"}


def test_the_walk_sees_the_imports_of_the_package() -> None:
    """Else the floors would hold of an empty house."""
    seen = {
        (room, name.split(".")[1])
        for room, path in rooms(ROOT)
        for _, name in imports(path, ROOT)
        if name.startswith(f"{ROOT.name}.")
    }
    for stair in [("policy", "topology"), ("linear", "kernels"), ("callbacks", "config")]:
        assert stair in seen
    assert any(n.startswith("lightning") for _, n in imports(ROOT / "callbacks/sparsity.py", ROOT))


@pytest.mark.parametrize(
    ("file", "source", "says"),
    [
        ("topology.py", "from .linear import X", "imports linear .* from topology"),  # up
        ("policy/rules.py", "from .. import kernels", "imports kernels .* from policy"),  # sideways
        ("kernels/deep/er.py", "from ...policy import rules", "imports policy .* from kernels"),
        ("topology.py", "def f():\n    from house.linear import X", "py:2: imports linear"),
        ("linear.py", "from house import BlockTopology", "imports __init__"),  # by the roof
        ("linear.py", "import cupy", "imports cupy; only kernels may"),
        ("attic/box.py", "x = 1", "attic: has no floor"),
    ],
)
def test_the_walk_catches(tmp_path: Path, file: str, source: str, says: str) -> None:
    path = tmp_path / "house" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path / "house")
    assert re.search(says, found)


# One process for everything, since each takes seconds to start.
IMPORTS = """
import sys
import torch

HEAVY = {"lightning", "pytorch_lightning", "transformers", "accelerate", "cupy", "hydra"}
HEAVY |= {"omegaconf", "wandb", "rich", "matplotlib", "plotly"}


def check(what):
    imported = HEAVY & sys.modules.keys()
    assert not imported, f"{what} imported {imported}"
    assert not torch.cuda.is_initialized()


import sparse_lightning
check("import sparse_lightning")
import sparse_lightning.integrations
check("import sparse_lightning.integrations")
import sparse_lightning.report
check("import sparse_lightning.report")
import sparse_lightning.cli
check("import sparse_lightning.cli")

layer = sparse_lightning.BlockSparseLinear(32, 32, block_size=16, density=0.5)
sparse_lightning.sparsify(torch.nn.Sequential(torch.nn.Linear(32, 32)), block_size=16)
layer(torch.zeros(2, 32)).sum().backward()
check("training without a trainer")

sparse_lightning.integrations.SparsityTrainerCallback
assert "transformers" in sys.modules
HEAVY = {"lightning", "cupy"}  # Transformers imports others
check("the callback for Transformers")

sparse_lightning.SparsityCallback
assert "lightning" in sys.modules
HEAVY = {"cupy"}
check("the callback for Lightning")
print("done")
"""


def test_trainers_are_imported_when_a_callback_is_asked_for() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


def test_every_public_name_is_there() -> None:
    for name in sparse_lightning.__all__:
        assert getattr(sparse_lightning, name) is not None
    with pytest.raises(AttributeError, match="SparsityCalback"):
        sparse_lightning.SparsityCalback  # noqa: B018
