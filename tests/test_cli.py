"""LightningCLI accepts the callback's keywords in its file and on its command line."""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from sparse_lightning import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    SparsityCallback,
    UpdateSchedule,
)
from sparse_lightning.config import SparsityConfig

# All keywords of the callback with values that differ from the defaults.
KEYWORDS: dict[str, Any] = {
    "block_size": 32,
    "include": ["fc*", "re:.*mlp"],
    "exclude": ["out"],
    "density": {"schedule": "cubic", "initial": 0.9, "final": 0.1, "begin": 0.1, "until": 0.5},
    "nm": "2:4",
    "distribution": "erdos_renyi",
    "layer_density": {"blocks.0.*": 0.5},
    "floor": {"layer": 0.05, "row": 2, "column": 0},
    "update": {"every_n_steps": 10, "begin": 0.1, "until": 0.6},
    "drop_fraction": {"schedule": "cosine", "initial": 0.4, "final": 0.1},
    "drop": "sparse_lightning.policy.criteria.movement",
    "grow": "random",
    "regrow": False,
    "regrow_inner": False,
    "rule": None,  # an alternative to `drop` and `grow`
    "token_stride": 2,
    "init": "magnitude",
    "shrink": False,
    "seed": 3,
    "follow": {"target": "net"},
    "monitor": {"every_n_updates": 5, "images": 2},
}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line with a file, and returns the configuration of its callback."""
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def run(keywords: dict[str, Any] | None, *args: str) -> SparsityConfig:
        callback = {"class_path": "sparse_lightning.SparsityCallback", "init_args": keywords}
        trainer = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": None if keywords is None else [callback],
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"trainer": trainer}))
        made = LightningCLI(
            BoringModel,
            run=False,
            seed_everything_default=False,
            save_config_callback=None,
            args=["--config", str(file), *args],
        )
        (sparsity,) = [c for c in made.trainer.callbacks if isinstance(c, SparsityCallback)]
        return sparsity.config

    return run


def test_the_callback_takes_the_fields_of_the_configuration() -> None:
    parameters = inspect.signature(SparsityCallback).parameters
    assert list(parameters) == [field.name for field in fields(SparsityConfig)] == list(KEYWORDS)
    assert SparsityCallback().config == SparsityConfig()
    assert SparsityCallback(**KEYWORDS).config == SparsityConfig(**KEYWORDS)
    # Callbacks must copy the defaults, which are shared objects.
    SparsityCallback().config.update.every_n_steps = 3
    assert SparsityCallback().config.update.every_n_steps == 100


def test_every_keyword_arrives(cli) -> None:
    config = cli(KEYWORDS)
    assert config == SparsityConfig(**KEYWORDS)
    default = SparsityConfig()
    same = [key for key in KEYWORDS if getattr(config, key) == getattr(default, key)]
    assert same == ["rule"]


def test_defaults(cli) -> None:
    assert cli({}) == SparsityConfig()


@pytest.mark.parametrize(
    ("keywords", "key", "expected"),
    [
        ({"density": 0.1}, "density", DensitySchedule("constant", 0.1, 0.1)),
        ({"density": {"final": 0.1}}, "density", DensitySchedule("cubic", 1.0, 0.1, 0, 0.5)),
        ({"drop_fraction": 0.2}, "drop_fraction", DropFractionSchedule("constant", 0.2, 0.2)),
        ({"monitor": None}, "monitor", None),
        ({"monitor": {"images": 0}}, "monitor", MonitorOptions(10, 0)),
        ({"update": {"begin": 200, "until": 1e3}}, "update", UpdateSchedule(100, 200, 1000)),
        ({"update": {"until": 1.0}}, "update", UpdateSchedule(100, 0, 1.0)),
        ({"exclude": []}, "exclude", ()),
        ({"nm": 124}, "nm", "2:4"),  # without quotes
    ],
)
def test_values_in_the_file(cli, keywords: dict, key: str, expected: object) -> None:
    value = getattr(cli(keywords), key)
    assert value == expected
    if isinstance(expected, UpdateSchedule):
        assert isinstance(value.until, float) and type(value.begin) is type(expected.begin)


def test_values_on_the_command_line(cli) -> None:
    config = cli(
        KEYWORDS,
        "--trainer.callbacks.density.final=0.2",
        "--trainer.callbacks.update.begin=0.2",
        "--trainer.callbacks.update.every_n_steps=20",
        "--trainer.callbacks.block_size=128",
        "--trainer.callbacks.monitor=null",
        "--trainer.callbacks.drop_fraction=0.5",
    )
    expected = KEYWORDS | {
        "density": KEYWORDS["density"] | {"final": 0.2},
        "update": KEYWORDS["update"] | {"begin": 0.2, "every_n_steps": 20},
        "block_size": 128,
        "monitor": None,
        "drop_fraction": 0.5,
    }
    assert config == SparsityConfig(**expected)


def test_a_number_overrides_a_mapping(cli) -> None:
    config = cli(KEYWORDS, "--trainer.callbacks.density=0.2")
    assert config.density == DensitySchedule("constant", 0.2, 0.2)


def test_the_command_line_alone(cli) -> None:
    config = cli(
        None,
        "--trainer.callbacks+=sparse_lightning.SparsityCallback",
        "--trainer.callbacks.density=0.2",
        "--trainer.callbacks.update.every_n_steps=20",
    )
    assert config == SparsityConfig(density=0.2, update={"every_n_steps": 20})


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"densty": 0.1}, ["densty"]),
        ({"densty": {"final": 0.1}}, ["densty"]),
        ({"density": {"fnal": 0.1}}, ["`density` has no key 'fnal'", "did you mean 'final'"]),
        ({"update": {"evry_n_steps": 5}}, ["`update` has no key 'evry_n_steps'"]),
        ({"update": {"begin": 1}}, ["`update.begin` must", "Write 1.0 or a step >= 2"]),
        ({"block_size": "foo"}, ["block_size", "foo"]),
        ({"block_size": 48}, ["`block_size` must", "16, 32, 64, 128", "got 48"]),
        ({"distribution": "foo"}, ["`distribution` must", "'uniform', 'erdos_renyi'", "'foo'"]),
        ({"include": "fc1"}, ["include", "fc1"]),
    ],
)
def test_what_is_wrong_is_named(cli, capsys, keywords: dict, says: list[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        cli(keywords)
    text = f"{error.value}\n{capsys.readouterr().err}"
    assert all(part in text for part in says), text


def test_a_mistyped_option_is_named(cli, capsys) -> None:
    with pytest.raises(SystemExit):
        cli(KEYWORDS, "--trainer.callbacks.densty=0.2")
    assert "densty" in capsys.readouterr().err
