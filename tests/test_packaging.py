"""The wheel and the editable install contain all files needed at run time.

Files that describe the package to others agree with pyproject.toml.
"""

import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# Runs outside the source tree, and prints where the package and its configs were found.
PROBE = """
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import hydra
import sparse_lightning

package = Path(sparse_lightning.__file__).parent
configs = files("sparse_lightning.configs")
with hydra.initialize_config_module("sparse_lightning.configs", version_base="1.3"):
    config = hydra.compose(overrides=["+callbacks=sparsity"])

assert (package / "py.typed").is_file()
assert all((package / "report" / f"page.{end}").is_file() for end in ("html", "css", "js"))
assert sparse_lightning.__version__ == version("sparse-lightning")
assert config.callbacks.sparsity._target_ == "sparse_lightning.SparsityCallback", config
print(package)
print(configs)
"""

# Runs every command in an empty folder, through the entry point that the wheel declares.
COMMANDS = """
import sys
from importlib.metadata import distribution
from pathlib import Path

# The commands work without these packages of extras; `report` needs plotly.
for package in (
    "accelerate", "cupy", "cupy_backends", "matplotlib", "onnx", "PIL", "rich", "safetensors",
    "transformers", "wandb",
):
    sys.modules[package] = None

import numpy as np
import torch
from sparse_lightning import BlockSparseLinear, cli
from sparse_lightning.history import HistoryWriter

Path("models.py").write_text(
    "from torch import nn\\n\\ndef build():\\n    return nn.Sequential(nn.Linear(32, 32))"
)
layer = BlockSparseLinear(32, 32, block_size=16, density=0.5)
torch.save(torch.nn.Sequential(layer).state_dict(), "last.pt")
HistoryWriter(Path("pattern.history")).start(0, {"0": np.eye(2, dtype=bool)}, {"0": 16}, {})

names, add = [], cli._add
cli._add = lambda commands, name, *rest: (names.append(name), add(commands, name, *rest))
small = "--block-sizes 16 --densities .5"
lines = [
    "env",
    f"plan models:build --input 8,32 --device cpu {small}",
    f"bench kernels --shape 8 32 32 --repeats 1 --device cpu {small}",
    f"tune --device cpu --output table.json --tokens 1 --repeats 1 --dtypes fp32 {small}",
    "export last.pt --to dense",
    "inspect last.pt",
    "report .",
]
(command,) = distribution("sparse-lightning").entry_points
main = command.load()
for line in lines:
    assert main(line.split()) == 0, line
assert {next(word for word in line.split() if word in names) for line in lines} == set(names)
print(Path(cli.__file__).parent)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return the command's standard output; fail with its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped_files(root: Path) -> set[str]:
    """The files that belong in the wheel: modules, kernels and their tables, configs."""
    folders = {"sparse_lightning": "sparse_lightning", "configs": "sparse_lightning/configs"}
    return {
        f"{shipped_as}/{path.relative_to(root / folder).as_posix()}"
        for folder, shipped_as in folders.items()
        for path in (root / folder).rglob("*")
        if path.suffix in {".py", ".cu", ".cuh", ".json", ".yaml", ".html", ".css", ".js"}
        or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built via the source archive from a copy, so that a stale build/ cannot leak in."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sparse_lightning", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Building without isolation needs no network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    (built,) = dist.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == shipped_files(ROOT)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def run_installed(code: str, target: Path, cwd: Path) -> str:
    """Return the output of Python code that imports the installed wheel."""
    # PYTHONPATH precedes the editable install's finder; the paths printed show that it was used.
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=path)


def test_the_wheel_works_away_from_the_tree(target: Path, tmp_path: Path) -> None:
    package, configs = run_installed(PROBE, target, tmp_path).splitlines()[-2:]
    assert Path(package) == target / "sparse_lightning"
    assert Path(configs) == target / "sparse_lightning" / "configs"


def test_every_command_of_the_wheel_runs_away_from_the_tree(target: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    *_, package = run_installed(COMMANDS, target, tmp_path).splitlines()
    assert Path(package) == target / "sparse_lightning"


def test_the_editable_install_works_away_from_the_tree(tmp_path: Path) -> None:
    found = run(sys.executable, "-c", PROBE, cwd=tmp_path)
    package, configs = found.splitlines()[-2:]
    assert Path(package) == ROOT / "sparse_lightning"
    assert Path(configs) == ROOT / "configs"


@pytest.mark.parametrize("name", ["rigl", "set", "cubic", "static"])
def test_every_preset_is_a_resource(name: str) -> None:
    configs = importlib.resources.files("sparse_lightning.configs")
    assert configs.joinpath("callbacks", "sparsity", f"{name}.yaml").is_file()


def test_the_citation_agrees_with_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = dict(re.findall(r'^(\w+) = "(.*)"$', text, flags=re.MULTILINE))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["title"] == project["name"]
    assert citation["abstract"] == project["description"]
    assert citation["license"] == project["license"]
