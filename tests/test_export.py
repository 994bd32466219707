"""Exported weights load into the unchanged dense model, and compute the same outputs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparse_lightning import BlockSparseLinear, BlockTopology, SparsityCallback, densify, sparsify
from sparse_lightning.cli import main
from sparse_lightning.export import (
    Input,
    bsr_state_dict,
    dense_state_dict,
    describe_layers,
    find_layers,
    graph,
    part_of,
    read_checkpoint,
    state_dict_of,
    uncompiled_state_dict,
    write_checkpoint,
    write_onnx,
    write_safetensors,
)
from sparse_lightning.export.files import with_state_dict


class Net(L.LightningModule):
    """A model with layers to swap, buffers, and a head tied to the embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, 32))
        self.norm = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, 32, bias=False)
        self.lm_head = nn.Linear(32, 32, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mlp(self.embedding(tokens))
        return self.lm_head(self.out(self.norm(x.mT).mT))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


TOKENS = torch.arange(32).reshape(4, 8)
SPARSE = {"mlp.0", "mlp.2", "out"}


def fit(folder: Path, *callbacks: L.Callback) -> tuple[L.Trainer, Net]:
    """Train with topology updates and a falling density."""
    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.5, "until": 0.5},
        update={"every_n_steps": 3},
        exclude=["lm_head"],
        shrink=False,  # keeps empty slots
        monitor=None,
    )
    trainer = L.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sparsity, *callbacks],
        default_root_dir=folder,
    )
    model = Net(width=96)
    trainer.fit(model, torch.utils.data.DataLoader(TOKENS, batch_size=2))
    return trainer, model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The checkpoint of a fit, and the model's outputs."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    trainer, model = fit(folder)
    for layer in (model.mlp[0], model.mlp[2], model.out):
        assert 0 < layer.topology.n_blocks < layer.topology.capacity
    trainer.save_checkpoint(folder / "last.ckpt")
    with torch.no_grad():
        return folder / "last.ckpt", model(TOKENS)


@pytest.fixture
def checkpoint(trained: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A copy of the fit's checkpoint in the test's folder."""
    path = tmp_path / "last.ckpt"
    path.write_bytes(trained[0].read_bytes())
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> Callable[..., tuple]:
    """Runs `sparse-lightning export` in a folder; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "project", raising=False)

    def export(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main(["export", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return export


def outputs(model: nn.Module, x: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def sparse_layer(mask: list[list[int]], capacity: int, dtype: torch.dtype) -> BlockSparseLinear:
    """A layer with blocks of 16 and shuffled slots, some of them empty."""
    topology = BlockTopology.from_mask(torch.tensor(mask) > 0, 16, capacity=capacity)
    shuffled = topology.coords[torch.randperm(capacity)]
    topology = BlockTopology(shuffled, topology.grid, 16)
    return BlockSparseLinear(
        topology.in_features, topology.out_features, topology=topology, dtype=dtype
    )


# -- state dicts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("mask", "capacity"),
    [
        ([[1, 0, 1], [0, 0, 0], [1, 1, 0]], 4),
        ([[1, 0, 1], [0, 0, 0], [1, 1, 0]], 7),
        ([[1, 1]], 2),
        ([[0, 0], [0, 0]], 3),
    ],
)
def test_weights_equal_the_layers(mask: list, capacity: int, dtype: torch.dtype) -> None:
    layer = sparse_layer(mask, capacity, dtype)
    saved = layer.state_dict()
    weight = dense_state_dict(saved)["weight"]
    assert weight.dtype == dtype and torch.equal(weight, layer.dense_weight())
    bsr = bsr_state_dict(saved)["weight"]
    assert bsr.layout == torch.sparse_bsr and bsr.dtype == dtype
    assert bsr.values().shape == (layer.topology.n_blocks, 16, 16)
    assert torch.equal(bsr.to_dense(), layer.dense_weight())
    assert set(saved) == {"values", "bias", "_extra_state"}, "the argument is not changed"


@pytest.mark.parametrize("capacity", [4, 7])
def test_transposed_weights(capacity: int) -> None:
    """Weights stored like those of Transformers' `Conv1D`, whose class the layer records."""
    layer = sparse_layer([[1, 0, 1], [0, 0, 0], [1, 1, 0]], capacity, torch.float32)
    layer._dense_class = nn.Bilinear  # any class other than nn.Linear
    saved = layer.state_dict()
    weight = dense_state_dict(saved)["weight"]
    assert torch.equal(weight, layer.dense_weight().T) and weight.is_contiguous()
    # PyTorch does not support the transposed BSR product.
    assert torch.equal(bsr_state_dict(saved)["weight"], weight)
    assert describe_layers(find_layers(saved)).layers[""].shape == (48, 48)


def test_blocks_named_as_by_save_pretrained() -> None:
    model = Net()
    sparsify(model, block_size=16, density=0.5)
    saved = model.state_dict()
    as_in_files = {key.replace(".values", ".weight"): value for key, value in saved.items()}
    expected, got = dense_state_dict(saved), dense_state_dict(as_in_files)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    with pytest.raises(ValueError, match=r"must have shape .*layer 'out'"):
        find_layers(as_in_files | {"out.weight": torch.zeros(1, 16, 16)})


def test_a_part_of_a_model() -> None:
    model = nn.ModuleDict({"net": nn.ModuleDict({"a": Net(), "b": nn.Linear(2, 2)})})
    sparsify(model["net"]["a"], block_size=16, density=0.5)
    saved = model.state_dict()
    part = part_of(saved, "net.a.")
    alone = model["net"]["a"].state_dict()
    assert [*part] == [*alone] and part._metadata == alone._metadata
    assert [*part_of(saved, "net.b")] == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"got 'net.c'. Names begin with net., net.a., net.b.\."):
        part_of(saved, "net.c")


def test_the_rest_is_untouched() -> None:
    model = Net()
    sparsify(model, block_size=16, density=0.5)
    saved = model.state_dict()
    dense = dense_state_dict(saved)
    assert [*dense] == [*Net().state_dict()]
    for name, tensor in dense.items():
        assert name.removesuffix(".weight") in SPARSE or tensor is saved[name]
    # `load_state_dict` reads the modules' versions.
    assert dense._metadata == Net().state_dict()._metadata


def test_layers_are_found_and_reported() -> None:
    model = Net()
    expected = sparsify(model, block_size=16, density=0.5)
    layers = find_layers(model.state_dict())
    assert {*layers} == SPARSE
    assert describe_layers(layers).layers == expected.layers


def test_other_modules_may_have_such_names() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(32, 32))})
    model["net"].register_parameter("values", nn.Parameter(torch.ones(3, 5)))
    sparsify(model, block_size=16, density=0.5)
    saved = model.state_dict() | {"meter._extra_state": {"count": 3}}
    dense = dense_state_dict(saved)
    assert [*dense] == ["net.values", "net.0.weight", "net.0.bias", "meter._extra_state"]


def test_tied_layers_share_a_weight(tmp_path: Path) -> None:
    def tied(layer: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, nn.ReLU(), layer)

    torch.manual_seed(1)
    sparse = tied(BlockSparseLinear(32, 32, block_size=16, density=0.5))
    x = torch.randn(3, 32)
    # Through a file, as pickling preserves shared memory.
    write_checkpoint(tmp_path / "tied.pt", sparse.state_dict())
    saved = read_checkpoint(tmp_path / "tied.pt")
    for convert in (dense_state_dict, bsr_state_dict):
        converted = convert(saved)
        assert converted["0.weight"] is converted["2.weight"]
    dense = tied(nn.Linear(32, 32))
    dense.load_state_dict(dense_state_dict(saved))
    close(outputs(dense, x), outputs(sparse, x))

    write_safetensors(tmp_path / "tied.safetensors", dense_state_dict(saved))
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert {*file.keys()} == {"0.weight", "0.bias"}
        others = {"2.weight": "0.weight", "2.bias": "0.bias"}
        assert file.metadata() == {"format": "pt"} | others
    dense = tied(nn.Linear(32, 32))
    safetensors.torch.load_model(dense, tmp_path / "tied.safetensors")
    close(outputs(dense, x), outputs(sparse, x))


def test_equal_layers_that_are_not_tied_stay_apart() -> None:
    layers = [BlockSparseLinear(32, 32, block_size=16, density=1.0) for _ in range(2)]
    with torch.no_grad():
        layers[1].values.copy_(layers[0].values)
    # The same holds for layers that share a parameter but have different topologies.
    layers += [BlockSparseLinear(32, 32, topology=topology(place)) for place in range(2)]
    layers[3].values = layers[2].values
    dense = dense_state_dict(nn.Sequential(*layers).state_dict())
    assert dense["0.weight"].data_ptr() != dense["1.weight"].data_ptr()
    assert torch.equal(dense["3.weight"], layers[3].dense_weight())
    assert not torch.equal(dense["3.weight"], dense["2.weight"])


def topology(place: int) -> BlockTopology:
    return BlockTopology.from_mask(nn.functional.one_hot(torch.tensor([place, 1]), 2) > 0, 16)


def test_an_averaged_model_as_a_module() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    sparsify(model, block_size=16, density=0.5)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    dense = AveragedModel(nn.Sequential(nn.Linear(32, 32)))
    dense.load_state_dict(dense_state_dict(averaged.state_dict()))
    x = torch.randn(2, 32)
    assert dense.n_averaged == 1
    close(outputs(dense, x), outputs(averaged, x))


def test_names_of_compiled_modules() -> None:
    model = Net()
    sparsify(model, block_size=16, density=0.5)
    compiled, dense = torch.compile(model), Net()
    saved = compiled.state_dict()
    torch.compile(dense).load_state_dict(dense_state_dict(saved))
    close(outputs(dense), outputs(model))
    dense = Net()
    uncompiled = uncompiled_state_dict(dense_state_dict(saved))
    dense.load_state_dict(uncompiled)
    close(outputs(dense), outputs(model))
    assert uncompiled._metadata == dense.state_dict()._metadata
    # Only a complete part of a name is removed.
    assert [*uncompiled_state_dict({"a._orig_mod_b.weight": 0})] == ["a._orig_mod_b.weight"]


def broken(**changes: Any) -> dict[str, Any]:
    """The state dict of a layer `fc` with entries replaced, or removed if None."""
    layer = nn.ModuleDict({"fc": BlockSparseLinear(32, 48, block_size=16, density=0.5)})
    pieces = {**layer.state_dict(), **{f"fc.{key}": value for key, value in changes.items()}}
    return {key: value for key, value in pieces.items() if value is not None}


VECTOR = broken()["fc._extra_state"]


@pytest.mark.parametrize("convert", [dense_state_dict, bsr_state_dict])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_extra_state": None}, "`fc._extra_state` must be the topology .* got none"),
        ({"values": None}, "`fc.values` must be the blocks .* got none"),
        ({"_extra_state": VECTOR.float()}, "an int32 vector; got torch.float32 of shape"),
        ({"_extra_state": b"moved"}, "an int32 vector; got bytes"),
        ({"_extra_state": VECTOR[:-2]}, "must hold 3 slots by its header; got 2"),
        ({"_extra_state": VECTOR[:3]}, "of format 1"),
        ({"_extra_state": VECTOR + 7}, "of format 1"),
        ({"_extra_state": VECTOR.new_tensor([1, 16, 3, 2, 1, 3, 0])}, r"3x2 grid .* got \(3, 0\)"),
        ({"_extra_state": VECTOR.new_tensor([1, 24, 3, 2, 1, 0, 0])}, "one of .* got 24"),
        (
            {"_extra_state": VECTOR.new_tensor([1, 16, 3, 2, 2, 0, 0, 0, 0])},
            "must not hold a block twice",
        ),
        ({"values": torch.zeros(4, 16, 16)}, r"must have shape \[3, 16, 16\] .* got \[4, 16, 16\]"),
        ({"values": torch.zeros(3, 32, 32)}, r"must have shape \[3, 16, 16\]"),
        ({"values": torch.zeros(3, 256)}, r"got torch.float32 of shape \[3, 256\]"),
        ({"weight": torch.zeros(48, 32)}, "must replace `fc.weight`; got both"),
    ],
)
def test_a_damaged_layer_is_named(convert: Callable, changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){says}.*\(layer 'fc'\)"):
        convert(broken(**changes))


def test_a_sharded_checkpoint_joined_by_dcp_to_torch() -> None:
    saved = Net().state_dict()
    sharded = {"state_dict": saved, "optimizer_0": {"state": {}}, "optimizer_1": {"state": {}}}
    assert state_dict_of(sharded) is saved
    assert with_state_dict(sharded, saved) == {"state_dict": saved}


def test_a_dense_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one block-sparse layer .* got 1\d other"):
        dense_state_dict(Net().state_dict())


# -- Lightning ----------------------------------------------------------------------------------


def test_dense_checkpoint_of_a_fit(trained, checkpoint: Path, run) -> None:
    status, printed, errors = run(checkpoint, "--to", "dense")
    assert (status, errors) == (0, "")
    assert all(f"{name} " in printed for name in SPARSE) and "last.dense.ckpt: " in printed
    written = checkpoint.with_name("last.dense.ckpt")

    model = Net.load_from_checkpoint(written)
    assert model.hparams.width == 96 and type(model.out) is nn.Linear
    close(outputs(model), trained[1])
    saved, of_the_run = (torch.load(path, weights_only=True) for path in (written, checkpoint))
    assert {"callbacks", "loops", "optimizer_states", "lr_schedulers"} == {*of_the_run} - {*saved}
    assert saved["pytorch-lightning_version"] == L.__version__ and saved["global_step"] == 12

    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    (metrics,) = trainer.test(
        Net(96), torch.utils.data.DataLoader(TOKENS, 4), ckpt_path=written, verbose=False
    )
    expected = nn.functional.cross_entropy(trained[1].flatten(0, 1), TOKENS.flatten())
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_entries_of_the_user_are_kept() -> None:
    state = {"fc.weight": torch.ones(1)}
    saved = {"state_dict": {}, "mine": 3, "callbacks": {}, "averaging_state": {}}
    assert with_state_dict(saved, state) == {"state_dict": state, "mine": 3}
    assert with_state_dict({}, state) is state


def test_averages_of_a_fit(tmp_path: Path, run) -> None:
    class Average(EMAWeightAveraging):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "ema.ckpt")
            self.expected = outputs(self._average_model.module)
            self.current = outputs(pl_module)

    average = Average(decay=0.8)
    fit(tmp_path, average)
    status, printed, _ = run("ema.ckpt", "--to", "dense")
    assert status == 0 and "the average" in printed
    close(outputs(Net.load_from_checkpoint("ema.dense.ckpt")), average.expected)
    assert not torch.allclose(average.expected, average.current, atol=1e-3)


# -- files --------------------------------------------------------------------------------------


def test_bsr_file(trained, checkpoint: Path, run) -> None:
    assert run(checkpoint, "--to", "bsr")[0] == 0
    saved = torch.load("last.bsr.pt", weights_only=True)
    assert {name for name, t in saved.items() if t.layout == torch.sparse_bsr} == {
        f"{name}.weight" for name in SPARSE
    }
    model = Net(96)
    model.load_state_dict({name: t.to_dense() for name, t in saved.items()})
    close(outputs(model), trained[1])
    model = Net(96)
    model.load_state_dict(saved, assign=True)
    assert model.out.weight.layout == torch.sparse_bsr
    close(outputs(model), trained[1])


def test_safetensors_file(trained, checkpoint: Path, run) -> None:
    assert run(checkpoint, "--to", "safetensors")[0] == 0
    with safe_open("last.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lm_head.weight": "embedding.weight"}
    model = Net(96)
    safetensors.torch.load_model(model, "last.safetensors")
    close(outputs(model), trained[1])


def test_safetensors_of_views(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"all": whole, "turned": whole.T, "flat": whole.view(-1), "part": whole[1]}
    write_safetensors(tmp_path / "views.safetensors", views)
    loaded = safetensors.torch.load_file(tmp_path / "views.safetensors")
    assert all(torch.equal(loaded[name], view) for name, view in views.items())
    with safe_open(tmp_path / "views.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("entry", "what"),
    [({"n": 3}, "dict for 'meter'"), (torch.eye(2).to_sparse(), "torch.sparse_coo for 'meter'")],
)
def test_safetensors_hold_tensors_only(tmp_path: Path, entry: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"dense tensors only for safetensors; got {what}"):
        write_safetensors(tmp_path / "x.safetensors", {"w": torch.ones(1), "meter": entry})
    assert not [*tmp_path.iterdir()]


def test_a_state_dict_stays_one(tmp_path: Path, run) -> None:
    model = Net()
    sparsify(model, block_size=16, density=0.5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert run("weights.pt", "--to", "dense", "--output", "out.pt")[0] == 0
    dense = Net()
    dense.load_state_dict(torch.load("out.pt", weights_only=True))
    close(outputs(dense), outputs(model))


@pytest.mark.parametrize("form", ["dense", "bsr", "safetensors", "onnx"])
def test_a_part_of_a_checkpoint(checkpoint: Path, run, form: str) -> None:
    """Export only the MLP, without its name as a prefix."""
    more = ["--model", "project:mlp", "--input", "n,32"] if form == "onnx" else []
    checkpoint.with_name("project.py").write_text(PROJECT)
    status, _, errors = run(checkpoint, "--to", form, "--prefix", "mlp", "--output", "part", *more)
    assert status == 0, errors
    if form == "onnx":
        return  # the command has compared it with the model
    read = safetensors.torch.load_file if form == "safetensors" else torch.load
    part, whole = read("part"), dense_state_dict(state_dict_of(read_checkpoint(checkpoint)))
    assert {*part} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, tensor in part.items():
        assert torch.equal(tensor.to_dense() if form == "bsr" else tensor, whole[f"mlp.{name}"])


def test_a_folder_of_transformers(tmp_path: Path, run) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "project.py").write_text(PROJECT)
    held = nn.ModuleDict({"gpt2": gpt2()})
    sparsify(held, block_size=16, density=0.5)
    torch.save(held.state_dict(), "weights.pt")
    arguments = ["weights.pt", "--to", "transformers", "--model", "project:gpt2"]
    assert "by --prefix" in run(*arguments)[2]
    arguments += ["--prefix", "gpt2"]
    status, printed, errors = run(*arguments)
    assert status == 0 and "Wrote weights.transformers" in printed, errors
    model = transformers.AutoModelForCausalLM.from_pretrained("weights.transformers")
    assert type(model) is type(held["gpt2"]) and not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        close(model(TOKENS).logits, held["gpt2"].eval()(TOKENS).logits)

    assert run(*arguments)[0] == 2, "it is there"
    (tmp_path / "weights.transformers" / "tokenizer.json").write_text("precious")
    assert run(*arguments, "--force")[0] == 0
    assert (tmp_path / "weights.transformers" / "tokenizer.json").read_text() == "precious"


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8, vocab_size=32))


def test_compiled_names_are_reported(tmp_path: Path, run) -> None:
    model = Net()
    sparsify(model, block_size=16, density=0.5)
    torch.save(torch.compile(model).state_dict(), tmp_path / "weights.pt")
    assert "add --uncompiled" in run("weights.pt", "--to", "dense")[1]
    printed = run("weights.pt", "--to", "dense", "--uncompiled", "--force")[1]
    assert "_orig_mod" not in printed
    Net().load_state_dict(torch.load("weights.dense.pt", weights_only=True))


def test_files_are_replaced_only_with_force(checkpoint: Path, run) -> None:
    there = checkpoint.with_name("last.dense.ckpt")
    there.write_text("precious")
    for form, ending in [("dense", "dense.ckpt"), ("bsr", "bsr.pt"), ("safetensors",) * 2]:
        output = checkpoint.with_name(f"last.{ending}")
        output.write_text("precious")
        status, printed, errors = run(checkpoint, "--to", form)
        assert status == 2 and "--force" in errors and printed == ""
        assert output.read_text() == "precious"
        assert run(checkpoint, "--to", form, "--force")[0] == 0
        assert output.stat().st_size > 1000


@pytest.mark.parametrize("form", ["dense", "bsr", "safetensors"])
def test_an_interrupted_write_leaves_nothing(
    checkpoint: Path, run, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(what: object, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    output = checkpoint.with_name("out")
    output.write_text("precious")
    status, _, errors = run(checkpoint, "--to", form, "--output", output, "--force")
    assert status == 1 and errors == "sparse-lightning: No space left on device\n"
    assert output.read_text() == "precious"
    assert {path.name for path in checkpoint.parent.iterdir()} == {"last.ckpt", "out"}


class Weird:
    pass


def lightning_of(state_dict: object) -> dict[str, object]:
    return {"state_dict": state_dict, "pytorch-lightning_version": L.__version__}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "must be an existing file"),
        ("folder", "dcp_to_torch"),
        (b"", "written by torch.save"),
        (b"PK\x03\x04 a zip that ends", "written by torch.save"),
        (b"no pickle", "written by torch.save"),
        (lightning_of({}) | {"hyper_parameters": Weird()}, "plain values only, .*Weird"),
        ([1, 2], "must hold a state dict, .* got list"),
        (torch.ones(2), "must hold a state dict, .* got Tensor"),
        ({1: torch.ones(2)}, "must hold a state dict, .* got dict"),
        ({}, "at least one block-sparse layer"),
        (lightning_of({"fc.weight": torch.ones(2)}), "at least one .* got 1 other entries"),
        (lightning_of(broken(_extra_state=None)), "`fc._extra_state` must .*layer 'fc'"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, run, content: object, says: str) -> None:
    path = tmp_path / "x.ckpt"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = {*tmp_path.iterdir()}
    status, _, errors = run("x.ckpt", "--to", "dense")
    assert status == 2 and errors.startswith("sparse-lightning: error: `")
    with pytest.raises(ValueError, match=f"(?s){says}"):
        read_and_convert(path)
    assert "Traceback" not in errors and {*tmp_path.iterdir()} == before


def read_and_convert(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    dense_state_dict(checkpoint.get("state_dict", checkpoint))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "gguf"], "invalid choice: 'gguf'"),
        ([], "required: --to"),
        (
            ["--to", "dense", "--output", "no/such/folder/x.pt"],
            "`output` must be a file in a folder",
        ),
        (["--to", "dense", "--output", "."], "`output` must be a file in a folder"),
        (["--to", "dense", "--model", "m:f"], "for onnx and transformers only; got --to dense"),
        (["--to", "bsr", "--input", "1,8"], "must be given for onnx only; got --to bsr"),
        (["--to", "transformers"], "`--model` must be given for transformers"),
        (["--to", "transformers", "--model", "project:build"], "a Transformers model.*got a Net"),
        (["--to", "dense", "--prefix", "net"], "got 'net'. Names begin with embedding., lm_head."),
        (["--to", "onnx"], "`--model` and `--input` must be given for onnx"),
        (["--to", "onnx", "--model", "project:build"], "`--input` must be given"),
        (["--to", "onnx", "--model", "build", "--input", "1,8"], "a module and a function in it"),
        (["--to", "onnx", "--model", "nowhere:f", "--input", "1,8"], "ModuleNotFoundError"),
        (["--to", "onnx", "--model", "project:nothing", "--input", "1,8"], "AttributeError"),
        (["--to", "onnx", "--model", "project:fails", "--input", "1,8"], "ZeroDivisionError"),
        (["--to", "onnx", "--model", "project:three", "--input", "1,8"], "got a int"),
        (["--to", "onnx", "--model", "project:other", "--input", "1,8"], "Missing key.*mlp.0"),
        (["--to", "onnx", "--model", "project:build", "--input", "1,8"], "which it raised"),
        (["--to", "onnx", "--model", "project:build", "--input", "1,8,int46"], "got '1,8,int46'"),
    ],
)
def test_wrong_options(checkpoint: Path, run, arguments: list[str], says: str) -> None:
    checkpoint.with_name("project.py").write_text(PROJECT)
    status, _, errors = run(checkpoint, *arguments)
    assert status == 2 and says.split(".*")[-1] in errors and says.split(".*")[0] in errors
    assert "Traceback" not in errors
    assert {path.name for path in checkpoint.parent.iterdir()} <= {
        "last.ckpt",
        "project.py",
        "__pycache__",
    }


@pytest.mark.parametrize(
    ("form", "module", "says"),
    [
        ("safetensors", "safetensors.torch", "pip install safetensors"),
        ("onnx", "onnx", "pip install onnx onnxscript onnxruntime"),
        ("onnx", "onnxscript", "pip install onnx onnxscript onnxruntime"),
    ],
)
def test_a_missing_package(
    checkpoint: Path, run, monkeypatch: pytest.MonkeyPatch, form: str, module: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    checkpoint.with_name("project.py").write_text(PROJECT)
    more = ["--model", "project:build", "--input", "1,8,int64"] if form == "onnx" else []
    status, _, errors = run(checkpoint, "--to", form, *more)
    assert status == 1 and says in errors and "Traceback" not in errors
    assert not [*checkpoint.parent.glob(f"*.{form}")]


# -- ONNX ---------------------------------------------------------------------------------------

PROJECT = """
from tests.test_export import Net, gpt2, nn, sparsify

three = lambda: 3
fails = lambda: 1 / 0
build = lambda: Net(96)
other = lambda: nn.Linear(2, 2)
mlp = lambda: Net(96).mlp


def sparse():
    model = Net(96)
    sparsify(model, block_size=16, density=0.5)
    return model
"""


def test_onnx_of_a_fit(trained, checkpoint: Path, run) -> None:
    checkpoint.with_name("project.py").write_text(PROJECT)
    arguments = ["--model", "project:build", "--input", "batch,time,int64"]
    status, printed, errors = run(checkpoint, "--to", "onnx", *arguments)
    assert status == 0, errors
    assert "of the model's" in printed
    session = onnxruntime.InferenceSession("last.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", "time"] and given.type == "tensor(int64)"
    (y,) = session.run(None, {given.name: TOKENS.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), trained[1], rtol=1e-4, atol=1e-5)
    assert run(checkpoint, "--to", "onnx", *arguments)[0] == 2, "it is there"


class Two(nn.Module):
    """A model with two inputs, one of fixed size, and outputs of several dtypes, some infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"y": y.masked_fill(~keep, -torch.inf), "best": y.argmax(-1)}


def test_onnx_of_several_inputs(tmp_path: Path) -> None:
    model, path = Two().train(), tmp_path / "two.onnx"
    inputs = [Input(("n", 16)), Input.parse("n, 8, bool")]
    difference = write_onnx(path, model, inputs)
    assert 0 <= difference < 1e-5 and not model.training
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [["n", 16], ["n", 8]]
    x, keep = torch.randn(7, 16), torch.rand(7, 8) > 0.5
    names = [one.name for one in session.get_inputs()]
    y, best = session.run(None, dict(zip(names, (x.numpy(), keep.numpy()), strict=True)))
    expected = model(x, keep)
    torch.testing.assert_close(torch.from_numpy(y), expected["y"])
    assert best.tolist() == expected["best"].tolist()


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("other", "rows", "says"),
    [
        (nn.Linear(16, 8), None, "must compute the model's outputs; .*Mismatched"),
        (nn.Linear(16, 1), None, "must compute the model's outputs; .*shape"),
        (Twice(16, 8), None, "must have the model's 1 tensor outputs; got 2"),
        (nn.Linear(16, 8), 3, "onnxruntime cannot run the graph: .*Expected: 3"),
    ],
)
def test_a_wrong_graph_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: nn.Module, rows: int | None, says: str
) -> None:
    export = torch.onnx.export

    def wrong(model: nn.Module, x: tuple, **options: Any) -> Any:
        if rows is not None:
            x, options["dynamic_shapes"] = (torch.zeros(rows, 16),), None
        return export(other.eval(), x, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match=f"(?s){says}"):
        write_onnx(tmp_path / "x.onnx", nn.Linear(16, 8), [Input(("n", 16))])
    assert not [*tmp_path.iterdir()]


def test_a_graph_is_written_without_onnxruntime(
    checkpoint: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    checkpoint.with_name("project.py").write_text(PROJECT)
    printed = run(checkpoint, "--to", "onnx", "--model", "project:build", "--input", "2,8,int64")[1]
    assert "Not compared with the model: pip install onnxruntime" in printed
    assert checkpoint.with_name("last.onnx").is_file()


def test_a_model_that_builds_sparse_layers_is_densified(checkpoint: Path, run) -> None:
    checkpoint.with_name("project.py").write_text(PROJECT)
    status, printed, errors = run(
        checkpoint, "--to", "onnx", "--model", "project.sparse", "--input", "2,8,int64"
    )
    assert status == 0 and "of the model's" in printed, errors


def test_a_size_that_cannot_vary(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)[:, :3] if x.shape[0] == 2 else x[:1, :3]

    with pytest.raises(RuntimeError, match="cannot write the model as ONNX"):
        write_onnx(tmp_path / "x.onnx", Fixed(), [Input(("n", 16))])
    assert not [*tmp_path.iterdir()]


def test_large_weights_are_written_next_to_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "SINGLE_FILE_BYTES", 0)
    path, model = tmp_path / "x.onnx", nn.Linear(64, 64)
    data = tmp_path / "x.onnx.data"
    data.write_text("precious")
    with pytest.raises(ValueError, match=r"x.onnx.data', which exists"):
        write_onnx(path, model, [Input((2, 64))])
    assert data.read_text() == "precious" and not path.exists()
    write_onnx(path, model, [Input((2, 64))], force=True)
    assert {file.name for file in tmp_path.iterdir()} == {"x.onnx", "x.onnx.data"}
    x = torch.randn(2, 64)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), outputs(model, x))


def test_onnx_needs_a_dense_model(tmp_path: Path) -> None:
    model = nn.Sequential(BlockSparseLinear(32, 32, block_size=16, density=0.5))
    with pytest.raises(ValueError, match=r"must be dense; .* densify\(model\)"):
        write_onnx(tmp_path / "x.onnx", model, [Input((2, 32))])
    assert write_onnx(tmp_path / "x.onnx", densify(model), [Input((2, 32))]) < 1e-5


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1,16", (1, 16), torch.float32),
        ("batch,16,int64", ("batch", 16), torch.int64),
        ("n, 3 ,float16", ("n", 3), torch.float16),
        ("bool", (), torch.bool),
    ],
)
def test_an_input_is_read(text: str, shape: tuple, dtype: torch.dtype) -> None:
    assert Input.parse(text) == Input(shape, dtype)
    assert Input.parse(str(Input(shape, dtype))) == Input(shape, dtype)


@pytest.mark.parametrize(
    "text", ["", "1,,2", "0,3", "-1,3", "1x3", "2,int46", "int64,3,float8", "1.5"]
)
def test_invalid_inputs_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="`--input` must be sizes"):
        Input.parse(text)
