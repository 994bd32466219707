"""`sparse_lightning.plan` and its command: measurements, output and errors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import sparse_lightning
from sparse_lightning import BlockSparseMLP, sparsify
from sparse_lightning.cli import main
from sparse_lightning.export import Input
from sparse_lightning.kernels import choice, cpu, measuring
from sparse_lightning.planning import measure
from sparse_lightning.planning.costs import Product, StepMemory
from sparse_lightning.planning.measure import (
    ProductSpeedups,
    Training,
    WholeBlocks,
    count_tokens,
    dense_times,
    fused_layers,
    not_kept_by_fusion,
    saved_by_fusion,
)

CPU = torch.device("cpu")

MODEL = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two blocks, a layer that only blocks of 16 divide, and a head."""

    def __init__(self, width=128):
        super().__init__()
        self.embedding = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.odd = nn.Linear(width, 48)
        self.head = nn.Linear(48, 2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.odd(x))


def build():
    return Net()


def fails():
    raise OSError("no weights here")


def on_a_device():
    net = Net()
    if net.odd.weight.is_meta:
        raise NotImplementedError("cannot be built on meta")
    return net


number = 3
bare = lambda: nn.Linear(64, 64)
text = lambda: "a model"
small = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())
integers = lambda: nn.Sequential(nn.Linear(32, 32), nn.Flatten(), Argmax())
frozen = lambda: nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)


def taught():
    nets = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)]
    return nn.ModuleDict({"student": nets[0], "teacher": nets[1].requires_grad_(False)})


def sparsified():
    import sparse_lightning

    net = Net()
    sparse_lightning.sparsify(net, block_size=16)
    return net


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)
'''


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The current folder, which contains a project. It is not on the path, as for an installed
    command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("project", "project.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "model.py").write_text(MODEL)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `sparse-lightning plan` in the folder; returns status, output and errors."""

    def plan(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["plan", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return plan


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions, as the measured values do not matter."""
    monkeypatch.setattr(measure, "_ROUNDS", 1)
    monkeypatch.setattr(measure, "_MAX_STEPS", 1)
    monkeypatch.setattr(measure, "_WARM_UP", 1)
    monkeypatch.setattr(measure, "_REPEATS", {"cpu": 1, "cuda": 3})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32))


# -- the command --------------------------------------------------------------------------------


def test_without_an_input(run) -> None:
    status, out, _ = run("project.model:build", "--densities", ".25", "--block-sizes", "16", "64")
    assert status == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert ["blocks.*.0", "2", "256x128", "16 64"] in lines
    assert ["blocks.*.2", "2", "128x256", "16 64"] in lines
    assert ["odd", "1", "48x128", "16"] in lines
    assert ["head", "1", "excluded"] in lines
    # 4 matrices of 128 x 256, the odd one, the head, their biases, and the embedding.
    weights, rest = 4 * 128 * 256 + 48 * 128, 2 * 48 + 768 + 48 + 2 + 256
    assert ["dense", "", f"{weights + rest:,}", "2.21 MB", "824 kFLOP"] in lines
    assert any(row[:3] == ["blocks of 16", "0.25", f"{weights // 4 + rest:,}"] for row in lines)
    odd = 3 * 128 * 48 // 4  # stays whole with blocks of 64
    assert any(
        row[:3] == ["blocks of 64", "0.25", f"{weights // 4 + rest + odd:,}"] for row in lines
    )
    assert "without --input nothing was measured" in out and "speed-up" not in out


def test_a_plan_and_its_check(run, quick) -> None:
    status, out, _ = run(
        "project.model:build", "--input", "4,16,int64", "--densities", ".5", ".25",
        "--block-sizes", "16", "32", "--check", "all", "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert ["odd", "1", "48x128", "16", "64"] in lines  # 64 tokens
    costs = [row for row in lines if len(row) == 8]
    assert costs[0][-3:] == ["step", "speed-up", "remark"]
    assert [row[:2] for row in costs[2:]] == [
        ["dense", ""],
        *([f"blocks of {b}", d] for b in (16, 32) for d in ("0.5", "0.25")),
    ]
    checks = lines[
        lines.index(["layers", "density", "expected", "measured", "error", "speed-up"]) :
    ]
    assert len([row for row in checks if row and row[0].startswith("blocks of")]) == 4
    assert "measured one by one" in " ".join(out.split()) and f"torch {torch.__version__}" in out


def test_a_pattern_halves_weights_and_memory(run, quick) -> None:
    status, out, _ = run(
        "project.model:build", "--input", "4,16,int64", "--densities", ".25", "--check", "all",
        "--block-sizes", "16", "--nm", "2:4", "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    weights, rest = 4 * 128 * 256 + 48 * 128, 2 * 48 + 768 + 48 + 2 + 256
    (dense,) = [row for row in lines if row and row[0] == "dense"]
    planned, checked = [row for row in lines if row and row[0] == "blocks of 16 at 2:4"]
    assert dense[1:4] == ["", "", f"{weights + rest:,}"]
    assert planned[1:4] == ["0.25", "0.125", f"{weights // 8 + rest:,}"]
    assert checked[1:3] == ["0.25", "0.125"] and len(checked) == 7
    text = " ".join(out.split())
    assert "Kernels multiply whole blocks, so FLOPs do not tell the time." in text
    assert "measured time in which products make whole blocks" in text


def test_the_bytes_of_a_training() -> None:
    """What else is allocated on a GPU belongs to others. Tensors know the index of their device."""
    net = nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32, affine=False))
    training = Training(net, [Input.parse("8,64")], "32-true", torch.device("cpu", 0))
    training.step()
    counts = 8 + 4  # of batches, and of AdamW's steps
    assert training._own_bytes() == 3 * 32 * 64 * 4 + 2 * 32 * 4 + counts + 8 * 64 * 4


def test_the_peak_memory_of_a_gpu(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepMemory(forward=1_000_000, peak=1_100_000, update=500_000)
    monkeypatch.setattr(Training, "peak_memory", lambda _: step)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    found = sparse_lightning.plan(
        net, "32,64", block_sizes=[16], densities=[0.25], device="cpu", check="all"
    )
    # 24,576 weights of 4 bytes and their moments are absent, and one hidden activation is not kept.
    expected = 1_100_000 - 24_576 * 4 * 3 - 32 * 256 * 4
    assert found.dense.peak == 1_100_000 and found.settings[0].peak == expected
    assert found.checks[0].expected_peak == expected
    assert found.checks[0].measured_peak == 1_100_000
    text = str(found)
    assert "peak memory" in text and "1.1 MB" in text and "peak, expected" in text
    assert f"{expected / 1_100_000 - 1:+.1%}" in text


def test_the_best_is_checked(run, quick) -> None:
    status, out, _ = run("project.model:build", "--input", "4,16,int64", "--check")
    assert status == 0
    _, table = out.split("Expected and measured steps")
    assert table.count("| blocks of") == 1


def test_what_cannot_be_built_on_meta_is_built(run) -> None:
    status, out, _ = run("project.model:on_a_device")
    assert status == 0 and "blocks.*.0" in out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["project"], 2, "`MODULE:FUNCTION` must be a module and a function in it"),
        (["nowhere.model:build"], 2, "ModuleNotFoundError: No module named 'nowhere'"),
        (["project.model:biuld"], 2, "which raised AttributeError"),
        (["project.model:number"], 2, "'int' object is not callable"),
        (["project.model:fails"], 2, "which raised OSError: no weights here"),
        (["project.model:text"], 2, "must build an nn.Module; got a str from"),
        (["project.model:bare"], 2, "got a bare nn.Linear"),
        (["project.model:small"], 2, "8x8 is not divisible by block_size=16"),
        (["project.model:sparsified"], 2, "must be dense; got block-sparse layers"),
        (["project.model:build", "--include", "fc*"], 2, "`include` must match at least one"),
        (["project.model:build", "--include", "re:("], 2, "`include` must hold valid regular"),
        (["project.model:build", "--densities", "2"], 2, "densities` must be"),
        (["project.model:build", "--input", "4,16,int46"], 2, "`--input` must be sizes"),
        (["project.model:build", "--input", "batch,16,int64"], 2, "must have numbers as sizes"),
        (
            ["project.model:build", "--input", "4,16"],
            2,
            "`--input` must describe the model's inputs",
        ),
        (["project.model:integers", "--input", "4,32"], 2, "no float tensor that depends on"),
        (["project.model:frozen", "--input", "4,32"], 2, "must have parameters to train"),
        (["project.model:build", "--check"], 2, "`--check` must come with `--input`"),
        (["project.model:taught", "--follow", "teacher"], 2, "`--follow` must be the names of two"),
        (
            ["project.model:taught", "--follow", "a=student"],
            2,
            "got 'a', which the model does not have",
        ),
        (["project.model:build", "--device", "tpu"], 2, "`--device` must be cuda or cpu"),
        (["project.model:build", "--block-sizes", "48"], 2, "invalid choice: 48"),
    ],
)
def test_what_is_wrong_is_said(run, arguments: list[str], status: int, says: str) -> None:
    found, out, err = run(*arguments)
    assert (found, says in err) == (status, True), err
    assert "Traceback" not in err and "Cost of the model" not in out


def test_exhausted_memory_is_reported(run, monkeypatch: pytest.MonkeyPatch, quick) -> None:
    def ends(_: Training) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Training, "forward", ends)
    status, _, err = run("project.model:build", "--input", "4,16,int64")
    assert status == 1 and "must fit into the memory of cpu" in err and "smaller sizes" in err


def test_help_has_examples(run) -> None:
    status, out, _ = run("--help")
    assert status == 0 and "sparse-lightning plan project.model:build --input 8,2048,int64" in out


# -- in Python ----------------------------------------------------------------------------------


def test_the_model_and_the_random_state_are_unchanged(quick) -> None:
    net = mlp().eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = sparse_lightning.plan(net, "8,32", densities=[0.5], device="cpu", check="best")
    assert found.dense.step and found.best and len(found.checks) == 1
    assert type(net) is nn.Sequential and type(net[0]) is nn.Linear and not net.training
    assert not net[0]._forward_hooks and bool((net[0].weight.grad == 1).all())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert str(found) in print_of(found)


def print_of(found: object) -> str:
    return f"{found}\n"


def test_settings_are_those_of_sparsify() -> None:
    net = mlp()
    found = sparse_lightning.plan(
        net, block_sizes=[16], densities=[0.4], distribution="erdos_renyi", device="cpu"
    )
    (only,) = found.settings
    sparsify(net, block_size=16, density=0.4, distribution="erdos_renyi")
    assert only.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert found.best is None and only.step is None and found.measured is None


class Taught(nn.Module):
    """A network and a copy of it."""

    def __init__(self, copy_of: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net = mlp()
        self.target = copy_of(self.net)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) - self.target(x).detach()
        return y


@pytest.mark.parametrize(
    ("copy_of", "follow", "copies"),
    [
        (lambda net: copy.deepcopy(net).requires_grad_(False), {}, "target"),
        (AveragedModel, {}, "target.module"),
        (lambda net: mlp(), {"target": "net"}, "target"),
        (lambda net: mlp().requires_grad_(False), {"target": "net"}, "target"),
    ],
    ids=["frozen", "AveragedModel", "follow", "frozen, follow"],
)
def test_copies_have_the_density_of_their_sources(
    copy_of: Callable[[nn.Module], nn.Module], follow: dict[str, str], copies: str, quick
) -> None:
    model = Taught(copy_of)
    found = sparse_lightning.plan(
        model,
        "8,32",
        block_sizes=[16, 32],
        densities=[0.5],
        distribution="erdos_renyi",
        follow=follow,
        precision="bf16-mixed",
        device="cpu",
        check="all",
    )
    expected = {f"{copies}.0": "net.0", f"{copies}.2": "net.2"}
    assert found.follows == expected and {*found.layers} == {*expected.values()}
    assert not found.skipped and f"{copies}.* follows net.*" in str(found)
    for setting in found.settings:
        made = copy.deepcopy(model)
        size, density = setting.block_size, setting.density
        sparsify(made, block_size=size, density=density, distribution="erdos_renyi", follow=follow)
        assert setting.parameters == sum(p.numel() for p in made.parameters())
        assert setting.trained == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert all(check.expected > 0 and check.measured > 0 for check in found.checks)


def test_copies_without_weights_need_follow(run) -> None:
    status, out, _ = run("project.model:taught", "--block-sizes", "16")
    assert status == 0 and "must be named in `follow`" in out
    status, out, _ = run("project.model:taught", "--follow", "teacher=student")
    assert status == 0 and "teacher.* follows student.*" in out and "must be named" not in out


def test_a_block_size_that_fits_nothing_has_no_settings() -> None:
    found = sparse_lightning.plan(mlp(), densities=[0.5], device="cpu")
    assert {setting.block_size for setting in found.settings} == {16, 32}
    assert set(found.unfit) == {64, 128} and "not divisible by block_size=64" in found.unfit[64]
    assert "no settings with blocks of 128" in str(found)


def test_a_model_that_cannot_be_copied() -> None:
    net = mlp()
    net.noise = torch.ones(3, requires_grad=True) * 2  # not a leaf
    with pytest.raises(ValueError, match=r"can be copied.*Give the function that builds it"):
        sparse_lightning.plan(net, "8,32", device="cpu")


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"precision": "8-bit"}, "`precision` must be one of '32-true'"),
        ({"distribution": "global"}, "`distribution` must be one of"),
        ({"block_sizes": []}, "`block_sizes` must hold at least one"),
        ({"block_sizes": [48]}, "`block_size` must be"),
        ({"nm": "1:4"}, "`nm` must be '2:4'.*got '1:4'"),
        ({"check": "some", "inputs": "8,32"}, "`check` must be one of"),
    ],
)
def test_wrong_arguments(keywords: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sparse_lightning.plan(mlp(), device="cpu", **keywords)


def test_arguments_that_are_not_models() -> None:
    with pytest.raises(ValueError, match=r"an nn.Module, or a function that builds one; got 3"):
        sparse_lightning.plan(3)
    with pytest.raises(ValueError, match=r"must build an nn.Module; got a int"):
        sparse_lightning.plan(lambda: 3)


# -- what is measured ---------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that runs twice, once under activation checkpointing, which repeats its forward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(32, 64)
        self.twice = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(lambda x: self.twice(x).relu(), x, use_reentrant=self.reentrant)
        return self.twice(input=x).sum(-1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_products_of_a_step(reentrant: bool) -> None:
    training = Training(Shared(reentrant), [Input.parse("2,5,32")], "32-true", CPU)
    counts = training.count_products(["first", "twice", "unused"])

    def product(op: str, *shape: int) -> Product:
        return Product(op, shape, torch.float32)

    # The model's input needs no gradient.
    assert counts["first"] == {product("fwd", 10, 32, 64): 1, product("dw", 10, 32, 64): 1}
    assert counts["twice"] == {
        product("fwd", 10, 64, 64): 3,
        product("dx", 10, 64, 64): 2,
        product("dw", 10, 64, 64): 2,
    }
    assert not counts["unused"] and count_tokens(counts["unused"]) == 0
    assert count_tokens(counts["first"]) == 10
    assert not training.model.first._forward_hooks and training.model.first.weight.grad is None


def test_products_are_timed_within_a_step(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock records layers without bias and inputs of three dimensions too."""

    def isolated(*_: object) -> float:
        raise AssertionError("the clock did not see a product")

    monkeypatch.setattr(Training, "isolated_seconds", isolated)
    layers = nn.Linear(32, 64, bias=False), nn.Linear(64, 128), nn.Linear(128, 32, bias=False)
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        net = nn.Sequential(*copy.deepcopy(layers))
        training = Training(net, [Input.parse("2,5,32")], precision, CPU)
        times, counts = dense_times(training, ["0", "1", "2"])
        assert {product.dtype for counter in counts.values() for product in counter} == {dtype}
        assert len(times.products) == 8 and min(times.products.values()) > 0
        assert set(times.casts) == (set() if dtype == torch.float32 else {"0", "1", "2"})
        assert times.launch == 0 and times.optimizer > 0 and times.step > 0


def test_an_unrecorded_product_is_timed_in_isolation(quick) -> None:
    training = Training(mlp(), [Input.parse("8,32")], "32-true", CPU)
    unseen = [Product(op, (7, 32, 48), torch.float32) for op in choice.STEP]
    clock = training.clock_steps(step=1.0, launch=0.0)
    assert all(clock.product_seconds(product) is None for product in unseen)
    assert all(training.isolated_seconds(product) > 0 for product in unseen)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_activations_between_layers_are_timed_within_a_step(
    quick, activation: type[nn.Module]
) -> None:
    net = nn.Sequential(nn.Linear(32, 64), activation(), nn.Linear(64, 32), nn.Tanh())
    training = Training(net, [Input.parse("8,32")], "bf16-true", CPU)
    counts = training.count_products(["0", "2"])
    clock = training.clock_steps(step=1.0, launch=0.0)
    for direction in ("forward", "backward"):
        assert clock.activation_seconds(direction, 8 * 64, torch.bfloat16)
        assert clock.activation_seconds(direction, 8 * 32, torch.bfloat16) is None
    saved = saved_by_fusion(clock, counts["0"], counts["2"])
    assert saved > 0
    twice = saved_by_fusion(clock, counts["0"] + counts["0"], counts["2"] + counts["2"])
    assert twice == pytest.approx(2 * saved)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*n) for n in ((64, 96), (64, 96), (96, 64)))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.mlp, x, use_reentrant=False)
        return self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("build", "hidden", "kept", "kept_compiled"),
    [
        # Eager, the backward of each operation keeps its operands, and ReLU's its result.
        (Gated, 2, 4, 3),
        (lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), 1, 2, 2),
        (lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), 1, 1, 1),
    ],
)
def test_what_a_dense_mlp_keeps(
    precision: str,
    compiled: bool,
    build: Callable[[], nn.Module],
    hidden: int,
    kept: int,
    kept_compiled: int,
) -> None:
    """One op keeps the results of the layers before the activation. 64 tokens, as features."""
    net = nn.Sequential(build())
    if compiled:
        net.compile()
    training = Training(net, [Input.parse("64,64")], precision, CPU)
    name = "0.gate" if hidden == 2 else "0.0"
    counts = training.count_products([name])[name]
    found = not_kept_by_fusion(training, net[0], counts, hidden)
    expected = (kept_compiled if compiled else kept) - hidden
    assert found == expected * 64 * 96 * (4 if precision == "32-true" else 2)


def test_what_a_checkpointed_mlp_keeps() -> None:
    net = nn.Sequential(Gated())
    net[0].checkpointed = True
    training = Training(net, [Input.parse("64,64")], "32-true", CPU)
    counts = training.count_products(["0.gate"])["0.gate"]
    assert not_kept_by_fusion(training, net[0], counts, 2) == 0


def test_pairs_of_layers_whose_activation_is_fused() -> None:
    def linears(*activations: nn.Module) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Linear(16, 16)]
        for activation in activations:
            layers += [activation, nn.Linear(16, 16)]
        return layers

    class Own(nn.Sequential):
        pass

    net = nn.ModuleDict(
        {
            "chain": nn.Sequential(*linears(nn.ReLU(), nn.GELU(), nn.SiLU())),
            "tanh": nn.Sequential(*linears(nn.Tanh(), nn.ReLU())),
            "own": Own(*linears(nn.ReLU())),
        }
    )
    names = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    # A layer belongs to one fused product only.
    assert list(dict(fused_layers(net, names))) == [
        ("chain.0", "chain.2"),
        ("chain.4", "chain.6"),
        ("tanh.2", "tanh.4"),
    ]
    assert list(dict(fused_layers(net, ["chain.2", "chain.4"]))) == [("chain.2", "chain.4")]
    glu = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))})
    names = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert list(dict(fused_layers(glu, names))) == [tuple(names)]
    assert not list(dict(fused_layers(glu, names[:2])))
    sparsify(net, block_size=16, density=1.0)
    assert [type(module) for module in net.values()] == [BlockSparseMLP, BlockSparseMLP, Own]


def test_the_steps_of_a_pattern_have_the_speedups_of_whole_blocks(
    quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ in the time of making whole blocks, which depends on the product."""
    asked: dict[str | None, set[float]] = {None: set(), "2:4": set()}
    whole: list[tuple[str, int, int]] = []

    def seconds(_: WholeBlocks, product: Product, block_size: int, n_blocks: int) -> float:
        whole.append((product.op, block_size, n_blocks))
        return 1.0 if product.op == "dw" else 10.0

    net, steps = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), {}
    monkeypatch.setattr(WholeBlocks, "seconds", seconds)
    for nm, densities in asked.items():

        def speedup(_: ProductSpeedups, product: Product, size: int, density: float) -> float:
            densities.add(density)  # noqa: B023
            return 1.0

        monkeypatch.setattr(ProductSpeedups, "get", speedup)
        found = sparse_lightning.plan(
            net, "8,64", block_sizes=[32], densities=[0.25], device="cpu", nm=nm
        )
        steps[nm] = found.settings[0].step
    assert asked[None] == asked["2:4"] == {0.25}
    # The first layer's input needs no gradient. What else differs is measured in microseconds.
    products = [("fwd", 32, 2), ("dw", 32, 2), ("fwd", 32, 2), ("dx", 32, 2), ("dw", 32, 2)]
    assert sorted(whole) == sorted(products)
    assert steps["2:4"] - steps[None] == pytest.approx(3 * 10 + 2 * 1, abs=1)


def test_making_whole_blocks_is_measured_once(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cpu, "expand", lambda *of: calls.append("expand"))
    whole = WholeBlocks(CPU)
    for op in ("fwd", "dx", "dw"):
        assert whole.seconds(Product(op, (16, 64, 32), torch.float32), 16, 4) > 0
    n_calls = len(calls)
    assert whole.seconds(Product("fwd", (99, 64, 32), torch.float32), 16, 4) > 0
    assert len(calls) == n_calls > 0


def test_without_a_table_speedups_are_measured(quick) -> None:
    speedups = ProductSpeedups(CPU)
    product = Product("dw", (16, 64, 32), torch.float32)
    found = speedups.get(product, 16, 0.25)
    assert found > 0 and speedups.measured
    assert speedups.get(product, 16, 0.25) == found, "once is enough"


def test_a_table_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def expected(*of: object, may_guess: bool) -> float:
        assert not may_guess
        asked.append(of)
        return 2.5

    monkeypatch.setattr(choice, "product_speedup", expected)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    speedups = ProductSpeedups(torch.device("cuda"))
    assert speedups.get(Product("dx", (8, 64, 32), torch.bfloat16), 32, 0.1) == 2.5
    assert asked == [("dx", torch.bfloat16, 32, (8, 64, 32), 0.1, 1)] and not speedups.measured


def test_layer_shapes_are_measured_as_by_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(measuring, "measure_missing", lambda *of: asked.append(of))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    half = [(Product(op, (8, 64, 32), torch.bfloat16), 16) for op in ("fwd", "dx")]
    exact = Product("fwd", (8, 64, 32), torch.float32), 32
    ProductSpeedups(torch.device("cuda")).prepare([*half, exact])
    ProductSpeedups(CPU).prepare(half)
    assert asked == [(1, [(torch.bfloat16, 16, 64, 32), (torch.float32, 32, 64, 32)])]
    torch.backends.cuda.matmul.allow_tf32 = True  # with which tables are not used
    try:
        ProductSpeedups(torch.device("cuda")).prepare([exact])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert asked.pop() == (1, [])


def test_only_block_sizes_that_fit_a_layer_are_measured(
    quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Product, int]] = []
    monkeypatch.setattr(ProductSpeedups, "prepare", lambda _, needed: asked.extend(needed))
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64))
    sparse_lightning.plan(net, "8,64", block_sizes=[32, 64], densities=[0.5], device="cpu")
    sizes = {size: {p.shape[1:] for p, s in asked if s == size} for _, size in asked}
    assert sizes == {32: {(64, 96), (96, 64), (64, 64)}, 64: {(64, 64)}}


def test_the_table_is_not_used_with_tf32(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "product_speedup", lambda *_, **__: 2.5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    speedups, product = (
        ProductSpeedups(torch.device("cuda")),
        Product("dx", (8, 32, 32), torch.float32),
    )
    assert speedups._from_table(product, 16, 0.5) == 2.5
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert speedups._from_table(product, 16, 0.5) is None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: (y, 3), lambda y: {"logits": y}, lambda y: {"loss": y.mean()}]
)
def test_losses(wrap: Callable[[Tensor], object]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> object:
            return wrap(self.layer(x))

    training = Training(Wrapped(), [Input.parse("4,32")], "bf16-true", CPU)
    before = training.model.layer.weight.detach().clone()
    training.forward().backward()
    assert training.model.layer.weight.grad.abs().sum() > 0
    assert before.dtype == torch.bfloat16
    training.update()
    assert torch.equal(training.model.layer.weight, before), "no step may change what is measured"


def test_compiled_blocks_are_planned(quick) -> None:
    """Compiled modules are measured compiled, and their products are counted nevertheless."""

    def build() -> nn.Sequential:
        net = nn.Sequential(mlp(), nn.Linear(32, 32))
        net[0].compile(backend="eager")
        return net

    found = sparse_lightning.plan(build, "8,32", block_sizes=[16], densities=[0.5], device="cpu")
    assert [layer.tokens for layer in found.layers.values()] == [8, 8, 8]


# -- accuracy -----------------------------------------------------------------------------------


@pytest.mark.gpu(alone=True)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_expected_and_measured_steps_on_a_gpu(precision: str) -> None:
    def build() -> nn.Sequential:
        width = 2048
        return nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                for _ in range(4)
            )
        )

    found = sparse_lightning.plan(
        build, "16384,2048", block_sizes=[64], densities=[0.5, 0.1], precision=precision,
        check="all",
    )  # fmt: skip
    assert found.launch and found.dense.step
    for check in found.checks:
        assert 1 / 1.5 < check.expected / check.measured < 1.5, found
        assert check.peak_error is not None and abs(check.peak_error) < 0.1, found
