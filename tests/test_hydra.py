"""The presets and their overrides, as Hydra composes them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sparse_lightning import DensitySchedule, DropFractionSchedule, MonitorOptions, UpdateSchedule
from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.criteria import momentum, saliency
from sparse_lightning.policy.distributions import Floor
from tests import extensions, processes

PRESETS = ("rigl", "set", "snfs", "cubic", "granet", "movement", "finetune", "static")

# A user's application: it finds the presets by the search path alone.
USERS_CONFIG = """
defaults:
  - callbacks: sparsity
  - _self_
hydra:
  searchpath: [pkg://sparse_lightning.configs]
"""
USERS_APP = """
import dataclasses
import json
import sys

import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    for callback in cfg.callbacks.values():
        print("CONFIG", json.dumps(dataclasses.asdict(hydra.utils.instantiate(callback).config)))


print("EARLY", {"sparse_lightning", "lightning", "torch"} & sys.modules.keys())
main()
"""


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("sparse_lightning.configs", version_base="1.3"):
        return compose(overrides=["+callbacks=sparsity", *overrides]).callbacks.sparsity


def config_of(*overrides: str, **options: Any) -> SparsityConfig:
    callback = instantiate(composed(*overrides), **options)
    assert type(callback).__module__.startswith("sparse_lightning.callbacks")
    return callback.config


def messages(error: BaseException | None) -> str:
    """The messages that Hydra prints: those of the error and its causes."""
    return "" if error is None else f"{error}\n{messages(error.__cause__)}"


def changed(config: SparsityConfig) -> dict[str, Any]:
    """Return the options that differ from the default preset."""
    default = dataclasses.asdict(config_of())
    return {k: v for k, v in dataclasses.asdict(config).items() if v != default[k]}


CUBIC = DensitySchedule("cubic", 1.0, 0.25, 0, 0.5)
HALVED = DensitySchedule("cubic", 0.5, 0.25, 0, 0.5)
LATE = DensitySchedule("cubic", 1.0, 0.25, 0.1, 0.7)
EARLY = DensitySchedule("cubic", 1.0, 0.25, 0, 0.4)
QUARTER = DensitySchedule("constant", 0.25, 0.25)


def test_every_preset_is_tested() -> None:
    import sparse_lightning.configs as configs

    folder = Path(configs.__file__).parent / "callbacks" / "sparsity"
    assert {path.stem for path in folder.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "density", "distribution", "drop", "grow"),
    [
        ("rigl", QUARTER, "uniform", "magnitude", "gradient"),
        ("set", QUARTER, "uniform", "magnitude", "random"),
        ("snfs", QUARTER, "uniform", "magnitude", "momentum"),
        ("cubic", CUBIC, "uniform", "magnitude", "gradient"),
        ("granet", HALVED, "uniform", "magnitude", "gradient"),
        ("movement", LATE, "global", "movement", "none"),
        ("finetune", EARLY, "uniform", "saliency", "none"),
        ("static", QUARTER, "uniform", "magnitude", "none"),
    ],
)
def test_presets(
    preset: str, density: DensitySchedule, distribution: str, drop: str, grow: str
) -> None:
    config = config_of(f"callbacks/sparsity={preset}")
    assert config.density == density
    assert (config.distribution, config.drop, config.grow) == (distribution, drop, grow)
    assert (config.block_size, config.update) == (64, UpdateSchedule())
    assert config.monitor == MonitorOptions()
    fraction = DropFractionSchedule(initial=0.0) if preset == "static" else DropFractionSchedule()
    assert config.drop_fraction == fraction


def test_only_static_means_its_blocks_to_stay() -> None:
    """A constant density in place of a falling one is a mistake, which the training tells."""
    for preset in PRESETS:
        if preset != "movement":  # its distribution needs a density that falls
            config = config_of(f"callbacks/sparsity={preset}", "callbacks.sparsity.density=0.1")
            assert config.expects_exchange == (preset != "static"), preset


def test_the_default_preset_has_the_defaults_of_the_callback() -> None:
    assert config_of() == config_of("callbacks/sparsity=rigl") == SparsityConfig()


def test_the_guide_has_what_each_preset_sets() -> None:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {text(each)}" for key, each in value.items()) + "}"
        return f"{value:g}" if isinstance(value, float) else str(value)

    rows = []
    for preset in PRESETS:
        sets = changed(config_of(f"callbacks/sparsity={preset}")).items()
        cells = [f"`{name}: {text(value)}`" for name, value in sets]
        rows.append(f"| `{preset}` | {', '.join(cells) or 'the defaults'} |")
    guide = Path(__file__).parents[1] / "docs" / "how-to" / "hydra.md"
    found = [line for line in guide.read_text().splitlines() if line.startswith("| `")]
    assert found == rows


def test_containers_may_be_converted() -> None:
    """Users may call `instantiate(config.callbacks, _convert_="all")`."""
    assert config_of(_convert_="all") == config_of()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_number_overrides_the_density_of_every_preset(preset: str) -> None:
    config = config_of(
        f"callbacks/sparsity={preset}",
        "callbacks.sparsity.density=0.1",
        "callbacks.sparsity.distribution=uniform",  # "global" needs a falling density
        "callbacks.sparsity.drop_fraction=0.2",
        "callbacks.sparsity.monitor=null",
    )
    assert config.density == DensitySchedule("constant", 0.1, 0.1)
    assert config.drop_fraction == DropFractionSchedule("constant", 0.2, 0.2)
    assert config.monitor is None


def test_overrides_of_the_dynamics() -> None:
    config = config_of(
        "callbacks.sparsity.drop=sparse_lightning.policy.criteria.saliency",
        "callbacks.sparsity.grow=momentum",
        "callbacks.sparsity.floor={row: 2, layer: 0.05}",
        "callbacks.sparsity.layer_density={up: 0.5, down: 0.1}",
        "callbacks.sparsity.regrow=false",
        "callbacks.sparsity.shrink=false",
    )
    assert config.drop_criterion is saliency and config.grow_criterion is momentum
    assert config.floor == Floor(layer=0.05, row=2, column=1)
    assert config.layer_density == {"up": 0.5, "down": 0.1}
    assert (config.regrow, config.shrink) == (False, False)


@pytest.mark.parametrize("text", ["2:4", '"2:4"', "'2:4'"])
def test_a_pattern_needs_no_quotes(text: str, tmp_path: Path) -> None:
    """Neither in a file, where YAML reads a number, nor on the command line."""
    assert config_of(f"callbacks.sparsity.nm={text}").nm == "2:4"
    mine = f"callbacks:\n  sparsity: {{nm: {text}, regrow_inner: false}}\n"
    (tmp_path / "config.yaml").write_text(USERS_CONFIG + mine)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = instantiate(compose("config").callbacks.sparsity).config
        again = instantiate(
            compose("config", overrides=["callbacks.sparsity.nm=null"]).callbacks.sparsity
        ).config
    assert (config.nm, config.regrow_inner) == ("2:4", False)
    assert (again.nm, again.regrow_inner) == (None, False)


def test_overrides() -> None:
    config = config_of(
        "callbacks/sparsity=cubic",
        "callbacks.sparsity.density.final=0.1",
        "callbacks.sparsity.density.until=1e3",
        "callbacks.sparsity.update.begin=0.1",
        "callbacks.sparsity.update.until=2000",
        "callbacks.sparsity.update.every_n_steps=10",
        "callbacks.sparsity.drop_fraction.initial=0.5",
        "callbacks.sparsity.block_size=16",
        "callbacks.sparsity.include=[fc1,'re:.*mlp']",
        "callbacks.sparsity.exclude=[]",
        "callbacks.sparsity.monitor.images=0",
    )
    assert changed(config) == {
        "density": dataclasses.asdict(DensitySchedule("cubic", 1.0, 0.1, 0, 1000.0)),
        "update": {"every_n_steps": 10, "begin": 0.1, "until": 2000, "times": None},
        "drop_fraction": {"schedule": "cosine", "initial": 0.5, "final": 0.0},
        "block_size": 16,
        "include": ("fc1", "re:.*mlp"),
        "exclude": (),
        "monitor": {"every_n_updates": 10, "images": 0, "layers": "groups", "record": True},
    }
    # Hydra keeps steps as ints and fractions as floats.
    assert type(config.update.until) is int and type(config.update.begin) is float


@pytest.mark.parametrize(
    ("override", "update"),
    [
        ("update.begin=200 update.until=300", UpdateSchedule(100, 200, 300)),
        ("update.until=1.0", UpdateSchedule(100, 0, 1.0)),
        ("update={every_n_steps:5}", UpdateSchedule(5, 0, 0.75)),
        ("update.times=[30,10,20]", UpdateSchedule(times=[10, 20, 30])),
        ("update={times:[10],until:50}", UpdateSchedule(100, 0, 50, [10])),
        (
            "update.times=tests.extensions.every_tenth_part",
            UpdateSchedule(times="tests.extensions.every_tenth_part"),
        ),
    ],
)
def test_overrides_of_times(override: str, update: UpdateSchedule) -> None:
    overrides = [f"callbacks.sparsity.{part}" for part in override.split()]
    config = config_of("callbacks/sparsity=rigl", *overrides)
    assert config.update == update
    assert type(config.update.until) is type(update.until)


@pytest.mark.parametrize("preset", ["rigl", "cubic"])
def test_user_defined_functions(preset: str) -> None:
    own = "tests.extensions"
    config = config_of(
        f"callbacks/sparsity={preset}",
        f"callbacks.sparsity.density={{schedule: {own}.quadratic, final: 0.2}}",
        f"callbacks.sparsity.drop_fraction.schedule={own}.quadratic",
        f"callbacks.sparsity.distribution={own}.first_full",
        f"callbacks.sparsity.update.times={own}.every_tenth_part",
    )
    assert config.density_at(0.5) == pytest.approx(0.4)
    assert config.drop_fraction_at(0.5) == pytest.approx(0.025)
    assert config.budgets({"a": (4, 4), "b": (10, 10)}).at(1.0) == {"a": 16, "b": 20}
    assert config.timetable(1000).updates() == [100, 200, 300, 400, 500, 600, 700]


@pytest.mark.parametrize(
    ("override", "patience"),
    [
        ("rule=tests.extensions.Still", 3),
        ("rule=tests.extensions.still", 5),
        ("rule={_target_: tests.extensions.Still}", 3),
        ("rule={_target_: tests.extensions.Demanding, patience: 4}", 4),
    ],
)
def test_a_user_defined_rule(override: str, patience: int) -> None:
    config = config_of("callbacks/sparsity=cubic", f"callbacks.sparsity.{override}")
    assert isinstance(config.update_rule, extensions.Still)
    assert config.update_rule.patience == patience
    assert config.training_options()["rule"].startswith("tests.extensions.")


def test_a_mapping_overrides_a_number() -> None:
    config = config_of(
        "callbacks/sparsity=rigl", "callbacks.sparsity.density={schedule:cubic,final:0.1}"
    )
    assert config.density == DensitySchedule("cubic", 1.0, 0.1, 0, 0.5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("callbacks.sparsity.densty=0.1", ["Key 'densty' not in 'SparsityNode'"]),
        ("callbacks.sparsity.density.fnal=0.1", ["fnal"]),
        ("callbacks.sparsity.update.evry_n_steps=5", ["evry_n_steps", "UpdateSchedule"]),
        ("callbacks.sparsity.monitor.image=5", ["image", "MonitorOptions"]),
        (
            "callbacks.sparsity.block_size=foo",
            ["callbacks.sparsity.block_size", "'foo'", "Integer"],
        ),
        ("callbacks.sparsity.block_size=64.5", ["callbacks.sparsity.block_size", "64.5"]),
        ("callbacks.sparsity.update.every_n_steps=1.5", ["update.every_n_steps", "1.5"]),
        ("callbacks.sparsity.update.begin=soon", ["update.begin", "soon"]),
        ("callbacks.sparsity.include=fc1", ["callbacks.sparsity.include", "fc1"]),
        ("callbacks/sparsity=rigle", ["rigle", *PRESETS]),
    ],
)
def test_errors_while_composing(override: str, says: list[str]) -> None:
    with pytest.raises(HydraException) as error:
        composed(override)
    text = messages(error.value)
    assert all(part in text for part in says), text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+callbacks.sparsity.densty=0.1", ["'densty'"]),
        (
            "+callbacks.sparsity.density.fnal=0.1",
            ["`density` has no key 'fnal'", "did you mean 'final'", "'until'"],
        ),
        (
            "+callbacks.sparsity.update.evry_n_steps=5",
            ["`update` has no key 'evry_n_steps'", "did you mean 'every_n_steps'"],
        ),
        (
            "callbacks.sparsity.distribution=foo",
            ["`distribution` must be one of 'uniform', 'erdos_renyi'", "got 'foo'"],
        ),
        ("callbacks.sparsity.block_size=48", ["`block_size` must", "16, 32, 64, 128", "got 48"]),
        ("callbacks.sparsity.nm=1:4", ["`nm` must be '2:4'", "or None", "got '1:4'"]),
        ("callbacks.sparsity.density=1.5", ["`density", "(0, 1]", "got 1.5"]),
        ("callbacks.sparsity.density=null", ["`density` must", "got None"]),
        ("callbacks.sparsity.update.begin=1", ["`update.begin` must", "Write 1.0 or a step >= 2"]),
        (
            "callbacks/sparsity=cubic callbacks.sparsity.density.until=0.8",
            ["`density.until` must not be after", "0.8"],
        ),
        ("callbacks.sparsity.update.times=[10,0]", ["`update.times` must be steps", "got 0"]),
        ("callbacks.sparsity.update.times=[]", ["`update.times` must be steps", "got none"]),
        ("callbacks.sparsity.update.times=often", ["`update.times` must", "got 'often'"]),
        ("callbacks.sparsity.rule=rigl", ["`rule` must be the dotted path", "got 'rigl'"]),
        (
            "callbacks.sparsity.density.schedule=tests.extensions.cubic",
            ["`density.schedule` must be one of", "no attribute 'cubic'"],
        ),
        (
            "callbacks.sparsity.distribution=tests.nowhere.f",
            ["`distribution` must be one of", "No module named 'tests.nowhere'"],
        ),
    ],
)
def test_errors_of_the_callback(override: str, says: list[str]) -> None:
    node = composed(*override.split())
    with pytest.raises(HydraException) as error:
        instantiate(node)
    text = messages(error.value)
    assert all(part in text for part in says), text


def test_a_rule_excludes_criteria() -> None:
    node = composed("callbacks/sparsity=set", "callbacks.sparsity.rule=tests.extensions.Still")
    with pytest.raises(HydraException) as error:
        instantiate(node)
    assert "`rule` must not be given together with `drop`, `grow`" in messages(error.value)


@pytest.fixture
def users_app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(USERS_CONFIG)
    (tmp_path / "app.py").write_text(USERS_APP)
    return tmp_path


@pytest.mark.parametrize(
    ("preset", "text", "density"),
    [
        ("cubic", "{final: 0.1}", DensitySchedule("cubic", 1.0, 0.1, 0, 0.5)),
        ("cubic", "0.1", DensitySchedule("constant", 0.1, 0.1)),
        ("rigl", "0.1", DensitySchedule("constant", 0.1, 0.1)),
        ("rigl", "{schedule: cubic, final: 0.1}", DensitySchedule("cubic", 1.0, 0.1, 0, 0.5)),
    ],
)
def test_a_users_file_can_override_the_preset(
    users_app: Path, preset: str, text: str, density: DensitySchedule
) -> None:
    file = users_app / "conf" / "config.yaml"
    other = "{_target_: collections.OrderedDict}"
    own = f"callbacks: {{sparsity: {{density: {text}}}, other: {other}}}"
    file.write_text(f"{USERS_CONFIG}\n{own}\n")
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        cfg = compose("config", overrides=[f"callbacks/sparsity={preset}"])
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    assert callbacks[0].config.density == density
    assert callbacks[1] == {}


@pytest.mark.slow
def test_a_users_app_sweeps_without_importing_the_package(users_app: Path) -> None:
    overrides = (
        "-m",
        "callbacks/sparsity=rigl,set,static",
        "callbacks.sparsity.block_size=16,32",
        "callbacks.sparsity.density=0.1",
        "callbacks.sparsity.update.begin=200",
        "callbacks.sparsity.update.until=1e3",
        "callbacks.sparsity.monitor=null",
    )
    done = subprocess.run(
        [sys.executable, "app.py", *overrides],
        cwd=users_app,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("EARLY set()\n")
    lines = [line for line in done.stdout.splitlines() if line.startswith("CONFIG ")]
    configs = [json.loads(line.removeprefix("CONFIG ")) for line in lines]
    grows = {"rigl": "gradient", "set": "random", "static": "none"}
    assert [(c["grow"], c["block_size"]) for c in configs] == [
        (grow, block_size) for grow in grows.values() for block_size in (16, 32)
    ]
    for config in configs:
        assert config["density"] == dataclasses.asdict(DensitySchedule("constant", 0.1, 0.1))
        update = {"every_n_steps": 100, "begin": 200, "until": 1000, "times": None}
        assert config["update"] == update
        assert config["monitor"] is None


def test_a_users_app_names_a_mistyped_key(users_app: Path) -> None:
    app = users_app / "app.py"
    done = processes.run(app, "callbacks.sparsity.densty=0.1", cwd=users_app, check=False)
    assert done.returncode != 0 and "CONFIG" not in done.stdout
    assert "Key 'densty' not in 'SparsityNode'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_composed_config_can_be_saved_and_read_again() -> None:
    """Hydra saves it as `.hydra/config.yaml`."""
    node = composed("callbacks/sparsity=rigl", "callbacks.sparsity.update.begin=0.1")
    again = OmegaConf.create(OmegaConf.to_yaml(node))
    assert instantiate(again).config == instantiate(node).config
