"""Saving and loading Transformers models with block-sparse layers."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, Sparsifier, densify, sparsify
from sparse_lightning.export import dense_state_dict, find_layers

# Imported after this package, which tests/conftest.py imports. Other orders need a new process.
transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 64, "vocab_size": 96}
TOKENS = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))


def bert(kind: str = "BertForMaskedLM", **config: Any) -> nn.Module:
    return build(kind, transformers.BertConfig(**WIDE, max_position_embeddings=16, **config))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 96}
    return build("GPT2LMHeadModel", transformers.GPT2Config(**sizes))


def llama(tied: bool = False) -> nn.Module:
    sizes = {**WIDE, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return build("LlamaForCausalLM", transformers.LlamaConfig(**sizes))


def qwen2() -> nn.Module:
    sizes = {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return build("Qwen2ForCausalLM", transformers.Qwen2Config(**sizes))


def vit() -> nn.Module:
    sizes = {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    return build("ViTForImageClassification", transformers.ViTConfig(**sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=96, decoder_start_token_id=0)
    return build("T5ForConditionalGeneration", config)


def mamba() -> nn.Module:
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 16}
    return build("MambaForCausalLM", transformers.MambaConfig(**sizes, vocab_size=96))


def neox() -> nn.Module:
    return build("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**WIDE))


def whisper() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    sizes |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 16, "max_source_positions": 8, "max_target_positions": 16}
    config = transformers.WhisperConfig(vocab_size=96, **sizes, **special, **lengths)
    return build("WhisperForConditionalGeneration", config)


def dinov2() -> nn.Module:
    # Its files store two layers of each MLP as one.
    sizes = {**SMALL, "image_size": 32, "patch_size": 16, "use_swiglu_ffn": True, "mlp_ratio": 3}
    return build("Dinov2ForImageClassification", transformers.Dinov2Config(**sizes))


def build(kind: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "bert_classifier": lambda: bert("BertForSequenceClassification", num_labels=16),
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "vit": vit,
    "t5": t5,
    "mamba": mamba,
    "neox": neox,
    "whisper": whisper,
    "dinov2": dinov2,
}


def logits(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {"input_ids": TOKENS}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
    elif model.main_input_name == "input_features":
        features = torch.randn(2, 16, 16, generator=generator).to(dtype)
        inputs = {"input_features": features, "decoder_input_ids": TOKENS}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        output: Tensor = model.eval()(**inputs)[0]
    return output


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def sparse_model(case: str = "llama", **options: Any) -> nn.Module:
    model = BUILDERS[case]()
    sparsify(model, **{"block_size": 16, "density": 0.5, "max_density": 0.75, **options})
    return model


def reload(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Return the model after saving and loading."""
    model.save_pretrained(folder)
    loaded: nn.Module = type(model).from_pretrained(folder, **options)
    return loaded


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Compare names, slots and outputs, bit for bit."""
    one, other = loaded.state_dict(), model.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("case", BUILDERS)
def test_saving_and_loading_preserves_the_model(case: str, tmp_path: Path) -> None:
    model = sparse_model(case)
    loaded = reload(model, tmp_path / "once")
    assert sparse(loaded) and not loaded.training
    assert_same(loaded, model)
    assert_same(reload(loaded, tmp_path / "twice"), model)
    layers = json.loads((tmp_path / "once/config.json").read_text())["quantization_config"][
        "layers"
    ]
    assert {*layers} == {*sparse(model)}


@pytest.mark.parametrize("case", ["llama", "gpt2", "dinov2"])
def test_patterns_within_blocks_are_saved(case: str, tmp_path: Path) -> None:
    model = sparse_model(case, nm="2:4")
    loaded = reload(model, tmp_path / "once")
    assert all(layer.nm == "2:4" for layer in sparse(loaded).values())
    assert_same(loaded, model)
    assert_same(reload(loaded, tmp_path / "twice"), model)
    config = json.loads((tmp_path / "once/config.json").read_text())["quantization_config"]
    assert {sizes["nm"] for sizes in config["layers"].values()} == {"2:4"}


PLAIN = """
import sys
import torch, transformers

sys.modules["sparse_lightning"] = None
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    except RuntimeError:
        print("refused", folder)
        continue
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config")
    torch.save(model.state_dict(), f"{folder}/read.pt")

del sys.modules["sparse_lightning"]
import sparse_lightning

getattr(transformers, kind).from_pretrained(folder)
print("accepted", folder)
"""


def python(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_this_package_dense_folders_load_and_sparse_ones_raise(
    tmp_path: Path,
) -> None:
    """Once it is imported, sparse ones load as well."""
    arguments, expected = [], {}
    for case in BUILDERS:
        model, folder = sparse_model(case), tmp_path / case
        expected[folder] = dense_state_dict(model.state_dict())
        copied = densify(copy.deepcopy(model))
        copied.save_pretrained(folder)
        assert sparse(model), "the original does not change"
        torch.testing.assert_close(logits(copied), logits(model), rtol=1e-4, atol=1e-5)
        arguments += [folder, type(model).__name__]
    refused = [tmp_path / f"sparse_{case}" for case in ("llama", "gpt2")]
    for folder in refused:
        model = sparse_model(folder.name.removeprefix("sparse_"))
        model.save_pretrained(folder)
        arguments += [folder, type(model).__name__]
    done = python(PLAIN, *arguments)
    assert done.returncode == 0, done.stderr
    lines = [*(f"refused {folder}" for folder in refused), f"accepted {refused[-1]}"]
    assert done.stdout.splitlines() == lines
    assert "got block_sparse" in done.stderr
    for folder, state_dict in expected.items():
        read = torch.load(folder / "read.pt")
        assert read.keys() == state_dict.keys()
        assert all(torch.equal(read[name], state_dict[name]) for name in read), folder


FIRST = """
import sys
import sparse_lightning

assert "transformers" not in sys.modules
import sparse_lightning.integrations.pretrained
import transformers

transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_pretrained_may_be_imported_before_transformers(tmp_path: Path) -> None:
    sparse_model().save_pretrained(tmp_path)
    done = python(FIRST, tmp_path)
    assert done.returncode == 0, done.stderr


# -- saving -------------------------------------------------------------------------------------


def swap(model: nn.Module, density: float = 0.5) -> None:
    sparsify(model, block_size=16, density=density)


def place(model: nn.Module) -> None:
    model.up_proj = BlockSparseLinear(32, 64, bias=False, block_size=16, density=0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: swap(model),
        lambda model: swap(model.model),
        lambda model: swap(model.model.layers[1].mlp),
        lambda model: swap(nn.ModuleDict({"held": model})),
        lambda model: place(model.model.layers[0].mlp),
        lambda model: Sparsifier(model, block_size=16),
        lambda model: densify(model.model.layers[0]) and swap(model),
    ],
)
def test_layers_that_were_swapped_in_any_module(
    change: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    model = llama()
    change(model)
    loaded = reload(model, tmp_path)
    assert sparse(loaded)
    assert_same(loaded, model)


def train(model: nn.Module, density: Any) -> None:
    """Train for eight steps, with an update every other step."""
    update = {"every_n_steps": 2, "until": 1.0}
    sparsifier = Sparsifier(model, block_size=16, density=density, update=update, total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for _ in range(8):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.detach()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_current_blocks_are_saved(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    swap(model, density=1.0)
    before = {name: layer.topology.capacity for name, layer in sparse(model).items()}
    assert_same(reload(model, tmp_path), model)
    train(model, {"schedule": "cubic", "initial": 1.0, "final": 0.25, "begin": 0, "until": 0.5})
    after = {name: layer.topology.capacity for name, layer in sparse(model).items()}
    assert all(after[name] < before[name] for name in after)
    loaded = reload(model, tmp_path)
    assert_same(loaded, model)
    # The loaded model continues to train.
    train(loaded.train(), 0.25)
    assert not torch.equal(logits(loaded), logits(model))
    assert_same(reload(loaded, tmp_path), loaded)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_saved_independently(
    through: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = reload(sparse_model(), tmp_path)
    copied = through(model)
    densify(copied.model.layers[0])
    assert_same(reload(copied, tmp_path / "copy"), copied)
    assert_same(reload(model, tmp_path / "model"), model)


def test_the_state_dict_argument_is_saved(tmp_path: Path) -> None:
    model = sparse_model()
    halved = {k: v / 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=halved)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight / 2)
    for name, layer in sparse(loaded).items():
        assert torch.equal(layer.values, sparse(model)[name].values / 2)
    model.save_pretrained(tmp_path, state_dict=dense_state_dict(model.state_dict()))
    assert not sparse(type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("case", ["llama", "gpt2", "dinov2"])
def test_a_densified_model_is_saved_like_one_that_was_always_dense(
    case: str, tmp_path: Path
) -> None:
    model, fresh = sparse_model(case), BUILDERS[case]()
    model.save_pretrained(tmp_path / "sparse")
    fresh.save_pretrained(tmp_path / "fresh")
    densify(model)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    files = [tmp_path / folder / "model.safetensors" for folder in ("fresh", "dense")]
    one, other = map(safetensors.torch.load_file, files)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()
    loaded = reload(sparse_model(case), tmp_path / "sparse")
    assert not sparse(loaded.dequantize()) and torch.equal(logits(loaded), logits(model))


def test_a_shared_config_describes_the_model_that_is_saved(tmp_path: Path) -> None:
    teacher = llama()
    student = type(teacher)(teacher.config)
    swap(student)
    for _ in range(2):
        assert not sparse(reload(teacher, tmp_path / "teacher"))
        assert_same(reload(student, tmp_path / "student"), student)


def test_the_files_load_as_a_state_dict(tmp_path: Path) -> None:
    model = sparse_model("gpt2")
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name, layer = next(iter(sparse(model).items()))
    key = name.removeprefix("transformer.")
    key = key if f"{key}.weight" in saved else name
    assert saved[f"{key}.weight"].shape == layer.values.shape
    assert {n.removeprefix("transformer.") for n in find_layers(saved)} == {
        n.removeprefix("transformer.") for n in sparse(model)
    }
    other = sparse_model("gpt2", seed=1)
    other.load_state_dict(saved, strict=False)  # The files do not hold the tied head.
    assert_same(other, model)


# -- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
        {"use_safetensors": True},
    ],
)
@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_options_of_from_pretrained(options: dict[str, Any], shards: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    swap(model)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    loaded = type(model).from_pretrained(tmp_path, **options)
    assert_same(loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = sparse_model("bert")
    loaded = reload(model, tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded), logits(model.to(dtype)))
    assert_same(reload(model, tmp_path), model)  # The model was converted in place.
    assert logits(copy.deepcopy(loaded).half()).dtype == torch.float16
    assert logits(copy.deepcopy(loaded).float()).dtype == torch.float32
    loaded.double().to("cpu", dtype)
    assert torch.equal(logits(loaded), logits(model))


def test_other_classes_load_the_parts_that_they_have(tmp_path: Path) -> None:
    model = sparse_model("bert")
    model.save_pretrained(tmp_path / "head")
    model.bert.save_pretrained(tmp_path / "base")
    kinds = [
        (transformers.AutoModel, "head", lambda m: m),
        (transformers.AutoModel, "base", lambda m: m),
        (transformers.AutoModelForMaskedLM, "base", lambda m: m.bert),
        (transformers.AutoModelForSequenceClassification, "head", lambda m: m.bert),
    ]
    for kind, folder, part in kinds:
        loaded = part(kind.from_pretrained(tmp_path / folder).eval())
        with torch.no_grad():
            expected = model.bert(TOKENS)[0]
            assert torch.equal(loaded(TOKENS)[0], expected)


def test_the_trainer_trains_a_loaded_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = reload(sparse_model(), tmp_path)
    before = logits(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, save_steps=1
    )
    data = [{"input_ids": text, "labels": text} for text in TOKENS]
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert not torch.equal(logits(model), before)
    assert_same(type(model).from_pretrained(tmp_path / "run/checkpoint-2"), model)


def test_missing_weights_are_initialized(tmp_path: Path) -> None:
    """T5 reads weights of block-sparse layers while it initializes the missing ones."""
    model = sparse_model("t5")
    state_dict = model.state_dict()
    (name, dense) = next((k, v) for k, v in state_dict.items() if k.endswith(".wo.weight"))
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in state_dict.items() if k != name})
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert 0 < loaded[name].std() < 1 and not torch.equal(loaded[name], dense)
    assert all(torch.equal(v, state_dict[k]) for k, v in loaded.items() if k != name)


# -- errors -------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}._extra_state": None}, f"must hold '{LAYER}._extra_state'.*'{LAYER}'"),
        ({f"{LAYER}.weight": None}, f"must hold '{LAYER}.weight'.*'{LAYER}'"),
        ({f"{LAYER}.weight": torch.zeros(64, 32)}, f"must hold '{LAYER}.weight'.*'{LAYER}'"),
        ({f"{LAYER}.weight": torch.zeros(1, 16, 16)}, f"must hold '{LAYER}.weight'.*'{LAYER}'"),
    ],
)
def test_damaged_files(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = {**safetensors.torch.load_file(file), **change}
    kept = {key: value for key, value in saved.items() if value is not None}
    safetensors.torch.save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    if all(tensor is not None for tensor in change.values()):
        with pytest.raises((RuntimeError, ValueError), match=r"mismatched|shape"):
            type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"capacity": None}, "must give block_size, capacity and shape"),
        ({"capacity": -1}, "must give block_size, capacity and shape"),
        ({"block_size": 24}, "must give block_size, capacity and shape"),
        ({"nm": "4:8"}, "and nm only as '2:4'"),
        ({"shape": [32, 32]}, "must be 32x32, as in the checkpoint; got 64x32"),
    ],
)
def test_a_damaged_config(sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][LAYER] |= sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{message}.*layer '{LAYER}'"):
        type(model).from_pretrained(tmp_path)


def test_a_wrong_capacity_in_the_config_is_corrected(tmp_path: Path) -> None:
    """The weights may come from a training step after the config was written."""
    model = sparse_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][LAYER]["capacity"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(type(model).from_pretrained(tmp_path), model)


def test_offloaded_blocks_raise(tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"`device_map` must keep .*layer 'model.layers.1.self"):
        type(model).from_pretrained(
            tmp_path, device_map=places, offload_folder=str(tmp_path / "offload")
        )


def test_a_config_for_a_dense_folder_raises(tmp_path: Path) -> None:
    model = sparse_model()
    llama().save_pretrained(tmp_path)
    config = model.config.quantization_config
    with pytest.raises(ValueError, match="must not be given for a dense model"):
        type(model).from_pretrained(tmp_path, quantization_config=config)
