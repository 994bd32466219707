"""Installs the wheel in clean environments, without and with each extra, and uses what that adds.

python tests/extras.py                # needs a package index; takes minutes
python tests/extras.py report export  # these extras alone

It prints how long each installation and each use took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import pages  # noqa: E402

_MODELS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
"""
# Trains a model, which leaves a checkpoint and a history in the folder `run`.
_TRAINING = """
import lightning as L
import torch
from torch import nn
from sparse_lightning import SparsityCallback

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def training_step(self, batch):
        return (self.net(batch) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4}, monitor={"images": 1})
data = torch.utils.data.DataLoader(torch.randn(256, 64), 16)
trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", callbacks=[sparsity], logger=LOGGER, default_root_dir="run"
)
trainer.fit(Model(), data)
trainer.save_checkpoint("run/last.ckpt")
"""
_CSV = _TRAINING.replace("LOGGER", 'L.pytorch.loggers.CSVLogger("run")')
_WANDB = _TRAINING.replace(
    "LOGGER", 'L.pytorch.loggers.WandbLogger(project="p", save_dir="run", offline=True)'
)
_NVRTC = """
import torch
from sparse_lightning.kernels import compiler
from sparse_lightning.kernels.portable.programs import linear_program

program = linear_program(torch.bfloat16, 64, forward=True)
assert compiler.compile_source(program.source, program.options, "sm_90a").code
"""
_START = "\n".join(pages.blocks(ROOT / "docs" / "start.md", "python"))

# For each extra, Python code and commands.
USES: dict[str, tuple[str, list[str]]] = {
    "": (_CSV, ["env", "plan models:build --input 8,64 --device cpu", "inspect run/last.ckpt"]),
    "cuda12": (_NVRTC, []),
    "cuda13": (_NVRTC, []),
    "wandb": (_WANDB, []),
    "report": (_CSV, ["report run", "report run --film run/masks.png"]),
    "export": (
        _START,
        [f"export checkpoints/last.ckpt --to {to}" for to in ("dense", "safetensors")],
    ),
    "examples": ((ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8"), []),
}


def main() -> None:
    """Print a line per extra; fail at the first that cannot be installed or used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", choices=[*USES], default=[*USES], metavar="EXTRA")
    extras = parser.parse_args().extras
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        _run(sys.executable, "-m", "build", "--wheel", "--outdir", dist, ROOT, cwd=folder)
        (wheel,) = dist.glob("*.whl")
        for extra in extras:
            home = Path(folder) / (extra or "none")
            begin = time.monotonic()
            python = _install(wheel, extra, home)
            installed = time.monotonic()
            _use(python, *USES[extra], cwd=home)
            used = time.monotonic()
            print(
                f"{extra or 'no extra'}: installed in {installed - begin:.0f} s, "
                f"used in {used - installed:.0f} s",
                flush=True,
            )


def _install(wheel: Path, extra: str, home: Path) -> Path:
    """Install the wheel with an extra in a new environment, and return its Python."""
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    target = f"{wheel}[{extra}]" if extra else str(wheel)
    _run(python, "-m", "pip", "install", "--quiet", "-c", constraints, target, cwd=home)
    return python


def _use(python: Path, code: str, commands: list[str], cwd: Path) -> None:
    (cwd / "models.py").write_text(_MODELS, encoding="utf-8")
    _run(python, "-c", code, cwd=cwd)
    for command in commands:
        _run(python.parent / "sparse-lightning", *command.split(), cwd=cwd)


def _run(*command: str | Path, cwd: str | Path) -> None:
    """Run a command, and raise RuntimeError with its output if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


if __name__ == "__main__":
    main()
