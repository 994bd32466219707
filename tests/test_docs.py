"""README and docs/ work: their Python, commands, overrides, configurations and links."""

from __future__ import annotations

import argparse
import ast
import html
import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from torch import nn

from sparse_lightning import SparsityCallback, cli
from tests import pages
from tests.pages import PAGES, ROOT
from tests.test_hydra import USERS_CONFIG

# Pages with code of tools that are not installed, which is fenced as ```py and not run.
OTHER_TOOLS = [ROOT / "docs" / "migration.md"]


class Model(L.LightningModule):
    """Stands for the reader's own `model`, which the pages use without defining it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.net(batch) - batch).square().mean()

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.randn(64, 128), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def with_any(language: str) -> list[Any]:
    return [pytest.param(p, id=pages.name(p)) for p in PAGES if pages.blocks(p, language)]


@pytest.mark.parametrize("page", with_any("python"))
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the blocks of a page in order, in one namespace."""
    code = pages.blocks(page, "python")
    if any("transformers" in block for block in code):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    if not any("ckpt_path" in block for block in code):
        # Lightning's short run overrides the example's length; it writes no checkpoints.
        monkeypatch.setenv("PL_TRAINER_FAST_DEV_RUN", "8")
    # With several GPUs, Lightning would start this process again for each of them.
    monkeypatch.setenv("PL_TRAINER_DEVICES", "1")
    model = Model()
    given = {"model": model, "datamodule": model.train_dataloader(), "untrained": Model()}
    given["__name__"] = "__main__"
    for block in code:
        exec(compile(block, str(page), "exec"), given)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that the code of docs/start.md leaves behind, and the names that it defines."""
    folder, names = tmp_path_factory.mktemp("start"), {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_TRAINER_DEVICES", "1")
        for block in pages.blocks(ROOT / "docs" / "start.md", "python"):
            exec(compile(block, "start.md", "exec"), names)
    return folder, names


OUTPUTS = [
    pytest.param(statement, text, id=f"{pages.name(page)}: {statement}")
    for page in PAGES
    for statement, text in pages.outputs(page)
]


@pytest.mark.slow
@pytest.mark.parametrize(("statement", "text"), OUTPUTS)
def test_pages_show_what_is_printed(
    statement: str,
    text: str,
    started: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Digits and the places of blocks, which processors round to, may differ; "..." is a gap."""
    folder, names = started
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    if statement.startswith("sparse-lightning "):
        assert cli.main(shlex.split(statement)[1:]) in (0, None)
    else:
        try:
            exec(statement, dict(names))
        except ValueError as error:
            print(f"ValueError: {error}")

    def simplified(output: str) -> str:
        output = re.sub(r"[▀▄█ ]+$", "▀", output, flags=re.M)
        return re.sub(r"\d+", "0", re.sub(r"-+", "-", re.sub(r" +", " ", output)))

    pattern = re.escape(simplified(text)).replace(r"\.\.\.", ".*")
    assert re.fullmatch(pattern, simplified(capsys.readouterr().out), flags=re.S)


@pytest.mark.slow
def test_the_picture_of_a_terminal_shows_what_is_printed() -> None:
    terminal = runpy.run_path(str(ROOT / "docs" / "terminal.py"))
    svg = (ROOT / "docs" / "images" / "terminal.svg").read_text(encoding="utf-8")
    assert "url(http" not in svg.replace('"', "")
    printed = terminal["draw"](terminal["select_lines"](terminal["run_in_terminal"]()))

    def lines(picture: str) -> list[str]:
        texts = re.findall(r'<text class="[^"]*" x="[^"]*" y="[^"]*"[^>]*>(.*?)</text>', picture)
        simplified = (re.sub(r"\d+", "0", html.unescape(text)) for text in texts)
        return [text.replace("\xa0", " ").strip() for text in simplified]

    assert "hidden.0" in " ".join(lines(svg)) and "ever active" in lines(svg)
    assert [x for x in lines(svg) if set(x) - set("━╸╺─")] == [
        x for x in lines(printed) if set(x) - set("━╸╺─")
    ]


def test_code_of_other_tools_parses_and_is_on_known_pages() -> None:
    assert [page for page in PAGES if pages.blocks(page, "py")] == OTHER_TOOLS
    for page in OTHER_TOOLS:
        for block in pages.blocks(page, "py"):
            ast.parse(block)
            assert "import sparse_lightning" not in block, "fence it as ```python, so it is run"


def test_every_code_block_has_a_known_language() -> None:
    for page in PAGES:
        opened = re.findall(r"^```(\w*).*\n(?:.*\n)*?```$", page.read_text("utf-8"), flags=re.M)
        assert set(opened) <= {"python", "py", "console", "yaml", "text"}, page


def our_commands() -> list[Any]:
    found = {}
    for page in PAGES:
        for command in (*pages.commands(page), *pages.inline_code(page)):
            if command.startswith("sparse-lightning "):
                found.setdefault(command, pages.name(page))
    return [pytest.param(command, id=f"{page}: {command}") for command, page in found.items()]


@pytest.mark.parametrize("command", our_commands())
def test_commands_parse(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shlex.split(command)
    parsed: list[argparse.Namespace] = []
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*arguments: Any) -> argparse.Namespace:
        options = parse(*arguments)
        options.run = parsed.append
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    try:
        cli.main(arguments[1:])
    except SystemExit:
        # Inline code may name a command without its required arguments.
        is_inline = not any(command in pages.commands(page) for page in PAGES)
        assert is_inline and "arguments are required" in capsys.readouterr().err
    else:
        assert len(parsed) == 1


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in pages.commands(page):
            program, argument, *_ = *shlex.split(command), ""
            if program == "make":
                assert re.search(rf"^{argument}:", makefile, flags=re.M), f"{page}: {command}"
            if argument.startswith(("examples/", "benchmarks/")):
                assert (ROOT / argument).exists(), f"{page}: {command}"


def overrides_of(command: str) -> tuple[str, list[str]] | None:
    """Return the Hydra app and the overrides of a command line, or None for other commands."""
    words = shlex.split(command)
    if words[:1] != ["python"] or words[1:2] not in (["app.py"], ["examples/train.py"]):
        return None
    return words[1], [word for word in words[2:] if word not in ("-m", "--multirun")]


def hydra_commands() -> list[Any]:
    found = {}
    for page in PAGES:
        for command in pages.commands(page):
            if overrides_of(command):
                found.setdefault(command, pages.name(page))
        for code in pages.inline_code(page):
            if re.match(r"callbacks[/.]sparsity\b.*=", code):
                found.setdefault(f"python app.py {code}", pages.name(page))
            elif re.match(r"'?[+~]?(model|callbacks)[/.\w]*=", code):
                found.setdefault(f"python examples/train.py {code}", pages.name(page))
    return [pytest.param(command, id=f"{page}: {command}") for command, page in found.items()]


@pytest.mark.parametrize("command", hydra_commands())
def test_overrides_compose(command: str, tmp_path: Path) -> None:
    found = overrides_of(command)
    assert found is not None
    app, overrides = found
    if app == "app.py":
        (tmp_path / "config.yaml").write_text(USERS_CONFIG)
    folder, name = (tmp_path, "config") if app == "app.py" else (ROOT / "examples/conf", "train")
    first = [text.split(",")[0] if is_sweep(text) else text for text in overrides]
    for values in (first, *alternatives(overrides, first)):
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(name, overrides=values)
        callback = config.callbacks.get("sparsity")
        assert callback is None or isinstance(instantiate(callback), SparsityCallback)


def is_sweep(override: str) -> bool:
    return OverridesParser.create().parse_override(override).is_sweep_override()


def alternatives(overrides: list[str], first: list[str]) -> list[list[str]]:
    """Return `first` with one sweep override replaced, for each of its other values."""
    found = []
    for i, override in enumerate(overrides):
        if is_sweep(override):
            key, values = override.split("=", 1)
            for value in values.split(",")[1:]:
                found.append([*first[:i], f"{key}={value}", *first[i + 1 :]])
    return found


@pytest.mark.parametrize("page", with_any("yaml"))
def test_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in pages.blocks(page, "yaml"):
        config = yaml.safe_load(block)
        if "trainer" in config:
            check_lightning_cli(config, tmp_path / "config.yaml", "--trainer.accelerator=cpu")
        elif "defaults" in config:
            (tmp_path / "config.yaml").write_text(block)
            with initialize_config_dir(str(tmp_path), version_base="1.3"):
                composed = compose("config")
            assert isinstance(instantiate(composed.callbacks.sparsity), SparsityCallback)
        elif "program" in config:
            check_wandb_sweep(config)
        else:
            callback = instantiate(config["callbacks"]["sparsity"])
            assert isinstance(callback, SparsityCallback)


def check_wandb_sweep(config: dict[str, Any]) -> None:
    """Check that the example accepts the command of every run, as W&B's agent composes it."""
    assert config["program"] == "examples/train.py"
    start, fixed, values = config["command"][:3], config["command"][3:-1], config["command"][-1]
    assert start == ["${env}", "python", "${program}"] and values == "${args_no_hyphens}"
    for combination in product(*(given["values"] for given in config["parameters"].values())):
        chosen = [
            f"{key}={value}" for key, value in zip(config["parameters"], combination, strict=True)
        ]
        with initialize_config_dir(str(ROOT / "examples/conf"), version_base="1.3"):
            composed = compose("train", overrides=[*fixed, *chosen])
        assert isinstance(instantiate(composed.callbacks.sparsity), SparsityCallback)


def check_lightning_cli(config: dict[str, Any], file: Path, *options: str) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    file.write_text(yaml.safe_dump(config))
    made = LightningCLI(
        BoringModel,
        run=False,
        seed_everything_default=False,
        save_config_callback=None,
        args=["--config", str(file), *options],
    )
    assert any(isinstance(c, SparsityCallback) for c in made.trainer.callbacks)


def test_options_of_lightning_cli_are_accepted(tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to" / "lightning-cli.md"
    config, *_ = map(yaml.safe_load, pages.blocks(page, "yaml"))
    n_tried = 0
    for command in pages.commands(page):
        *start, options = command.split("fit ")
        assert start == ["python main.py "]
        given = options.replace("--config config.yaml", "").split()
        quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
        callbacks = config if given != options.split() else {}
        check_lightning_cli(callbacks, tmp_path / "config.yaml", *quiet, *given)
        n_tried += 1
    assert n_tried


def test_every_option_is_documented() -> None:
    """The page on configuration lists every key."""
    from sparse_lightning.config import SparsityNode

    (block, *_) = pages.blocks(ROOT / "docs" / "how-to" / "configure.md", "yaml")
    shown = yaml.safe_load(block)["callbacks"]["sparsity"]
    assert list(shown) == list(SparsityNode.__dataclass_fields__)


def test_links_work_in_the_repository() -> None:
    """Links also work for readers of the repository, without the site."""
    read = [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
    links = [
        (page, link)
        for page in read
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > len(read)
    assert not [(page, link) for page, link in links if not (page.parent / link).exists()]


def test_decisions_are_numbered_in_order() -> None:
    page = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", page, flags=re.M)]
    assert numbers == list(range(1, 1 + len(numbers)))


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > len(PAGES)
    # A browser would load these; the `offline` plugin makes the site's own links relative.
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    assert not [(path, found) for path in built if (found := loaded.findall(path.read_text()))]
    assert (tmp_path / "search" / "search_index.js").is_file()
    assert "BlockSparseLinear" in (tmp_path / "api" / "layers.html").read_text()
