"""Every Python example in the README runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


class Model(L.LightningModule):
    """The reader's own `model`, which the README does not spell out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.net(batch) - batch).square().mean()

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.randn(64, 128), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def blocks() -> list:
    """The README's ```python blocks, each named by the line it starts on."""
    text = README.read_text(encoding="utf-8")
    return [
        pytest.param(match[1], id=f"line-{text.count(chr(10), 0, match.start()) + 1}")
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def example(containing: str) -> dict[str, Any]:
    """What the one Python block with these words defines, for tests of what it does."""
    (code,) = [block.values[0] for block in blocks() if containing in block.values[0]]
    defined: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), defined)
    return defined


@pytest.mark.parametrize("code", blocks())
def test_readme_example_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "transformers" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    # Lightning's own short run, whatever the example asks for.
    monkeypatch.setenv("PL_TRAINER_FAST_DEV_RUN", "8")
    # On several GPUs it would start this process again for each of them.
    monkeypatch.setenv("PL_TRAINER_DEVICES", "1")
    model = Model()
    given = {"model": model, "datamodule": model.train_dataloader()}
    exec(compile(code, str(README), "exec"), given)


def test_what_is_promised_is_shown_by_tests_that_exist() -> None:
    table = README.read_text(encoding="utf-8").split("## What it promises")[1].split("\n## ")[0]
    folder, rows = Path(__file__).parent, table.split("| promised |")[1].splitlines()[2:]
    shown = [re.findall(r"`([\w/]*(?:\.py)?)(?:::(test_\w+))?`", row.split("|")[-2])
             for row in rows if row.startswith("|")]  # fmt: skip
    assert len(shown) > 15 and all(shown)
    for references in shown:
        file = ""
        for path, test in references:
            file = path or file
            assert not test or f"def {test}(" in (folder / file).read_text(), f"{file}::{test}"
            assert (folder / file).is_file(), file
