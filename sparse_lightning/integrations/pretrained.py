"""Saves and loads Transformers models that have block-sparse layers, in Transformers' own way.

To Transformers the blocks are a kind of quantization, "block_sparse": `config.json` says which
layers are block-sparse, so that `from_pretrained` builds these before it loads their blocks.
Importing this module registers it.

In the files the blocks of a layer lie under `<layer>.weight`, as a tensor of three dimensions, with
its topology beside it. So a program that does not know this package finds a weight of another shape
than it expects, and fails. Under another name, it would draw the weight anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_lightning.export.state_dicts import layers_in
from sparse_lightning.patching import convert_to_match, densify
from sparse_lightning.selection import sparse_layers
from sparse_lightning.topology import BlockTopology, block_grid

METHOD = "block_sparse"
LOADS_SINCE = "5.4"


@register_quantization_config(METHOD)
class BlockSparseConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """What `config.json` says of the block-sparse layers.

    Args:
        layers: of each layer, by name, its "block_size", its "capacity" and its "shape",
            [out_features, in_features].
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.layers = {name: dict(sizes) for name, sizes in layers.items()}

    @classmethod
    def of(cls, topologies: Mapping[str, BlockTopology]) -> BlockSparseConfig:
        """Describe layers that have these blocks."""
        return cls(
            {
                name: {
                    "block_size": at.block_size,
                    "capacity": at.capacity,
                    "shape": [at.out_features, at.in_features],
                }
                for name, at in topologies.items()
            }
        )

    def empty_topology(self, name: str) -> BlockTopology:
        """Return a topology of the layer's sizes. Which blocks its slots hold is loaded later."""
        sizes = self.layers[name]
        try:
            out_features, in_features = sizes["shape"]
            grid = block_grid(out_features, in_features, sizes["block_size"])
            coords = torch.full((sizes["capacity"], 2), -1, dtype=torch.int32, device="cpu")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "`quantization_config` must say block_size, capacity and shape of each layer; got "
                f"{sizes} (layer '{name}'). The folder's config.json is damaged; save the model "
                "again, by save_pretrained."
            ) from error
        return BlockTopology(coords, grid, sizes["block_size"])


@register_quantizer(METHOD)
class BlockSparseQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """What Transformers asks when it saves or loads a model with block-sparse layers."""

    quantization_config: BlockSparseConfig

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # By the name of a weight in the files, that of the parameter it becomes.
        self._blocks: dict[str, str] = {}
        # The dtypes that the parameters are to have.
        self._dtypes: dict[str, torch.dtype] = {}
        self._to_blocks: Any = None
        # The names in the files, with those of parameters for weights.
        self._found: set[str] = set()

    # Saving.

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *_: Any
    ) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Return the state dict to write; the model's config then describes what is in it."""
        state_dict = _given_state_dict()
        if getattr(model, "_hf_peft_config_loaded", False):
            return state_dict, {}  # Adapters alone are written, and no config.
        if state_dict is None:
            state_dict = model.state_dict()
        layers = layers_in(state_dict)
        _note(model, {name: layer.topology for name, layer in layers.items()})
        _keep_whole(model, layers)
        blocks = {f"{name}.values": f"{name}.weight" for name in layers}
        return {blocks.get(key, key): value for key, value in state_dict.items()}, {}

    # Loading.

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not _version(transformers.__version__) >= _version(LOADS_SINCE):
            raise RuntimeError(
                f"`transformers` must be {LOADS_SINCE} or later to load block-sparse layers, as "
                f"earlier ones load no extra states; got {transformers.__version__}. Upgrade it."
            )
        if not self.pre_quantized:
            raise ValueError(
                "`quantization_config` must be left out to load a dense model; got a "
                "BlockSparseConfig. Load it, and call sparsify(model)."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        modules = dict(model.named_modules(remove_duplicate=False))
        base = f"{model.base_model_prefix}."
        topologies: dict[str, BlockTopology | None] = {}
        for saved in self.quantization_config.layers:
            # A base model is loaded of the folder of one with a head, or the other way around.
            # Transformers reports weights that have no place, as those of another head.
            names = (saved, saved.removeprefix(base), base + saved)
            name = next((name for name in names if name in modules), None)
            if name is None:
                continue
            topologies[name] = self.quantization_config.empty_topology(saved)
            for own in (name, name.removeprefix(base), base + name):
                self._blocks[f"{own}.weight"] = f"{own}.values"
        convert_to_match(model, topologies)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for _, layer in sparse_layers(model):
            # Transformers initializes what the files lack, and may reach for the weights of others
            # on the way. It leaves alone what is marked so.
            shape = (layer.out_features, layer.in_features)
            stand_in = torch.empty(shape[::-1] if layer.transposed else shape, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            vars(layer)["weight"] = stand_in
        return model

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        blocks, found = self._blocks, self._found

        class ToBlocks(WeightRenaming):  # type: ignore[misc, unused-ignore]
            """Says which parameter the weights of block-sparse layers become."""

            __slots__ = ()

            def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
                key = blocks.get(source_key, source_key)
                found.add(key)
                return key, None

        self._to_blocks = ToBlocks("", "")  # without a pattern, as it sees every key
        return [self._to_blocks]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name, parameter in model.named_parameters():
            # Transformers before 5.22 leaves it in the dtype of the files.
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        base = f"{model.base_model_prefix}."
        for name, layer in sparse_layers(model):
            vars(layer).pop("weight", None)
            if layer.values.device.type == "meta":
                raise ValueError(
                    "`device_map` must keep block-sparse layers on the devices that compute them, "
                    f"as their topology is not offloaded; got one that is (layer '{name}'). Leave "
                    "it out, or put the layer on such a device."
                )
            at = layer.topology
            shapes = {
                "values": (at.capacity, at.block_size, at.block_size),
                "bias": (at.out_features,),
            }
            loaded = {
                piece
                for piece, parameter in layer.named_parameters()
                if hasattr(parameter, "_is_hf_initialized") and parameter.shape == shapes[piece]
            }
            names = (name, name.removeprefix(base), base + name)
            if any(f"{each}._extra_state" in self._found for each in names):
                loaded.add("_extra_state")
            for piece in layer.state_dict():
                if piece not in loaded:
                    saved = "weight" if piece == "values" else piece
                    raise ValueError(
                        f"The files must hold '{name}.{saved}' as the layer's config has it; got "
                        f"none, or one of another shape (layer '{name}'). Save the model again, by "
                        "save_pretrained."
                    )
            layer.to(layer.values.device)  # the topology follows
        # Saving undoes what it finds here.
        done = vars(model).get("_weight_conversions")
        if done is not None:
            kept = [each for each in done if each is not self._to_blocks]
            vars(model)["_weight_conversions"] = kept
        # Unlike a quantized model, this one may be cast, trained and saved as any other.
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(attribute, None)
        for part in _pretrained(model):
            vars(part.config).pop("_is_quantized", None)
        note(model)
        return model

    # What else it can do.

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        note(model)


class _Offer:
    """The quantizer of each model that has block-sparse layers, wherever these came from.

    It is found by `model.hf_quantizer`, but is no part of the model, its copies or its pickles.
    """

    def __get__(self, model: PreTrainedModel | None, owner: type) -> BlockSparseQuantizer:
        # A config may still speak of layers that there are no more; saving sets it right.
        if model is not None and (_noted(model.config) or any(sparse_layers(model))):
            topologies = {name: layer.topology for name, layer in sparse_layers(model)}
            return BlockSparseQuantizer(BlockSparseConfig.of(topologies))
        raise AttributeError(f"'{owner.__name__}' object has no attribute 'hf_quantizer'")


PreTrainedModel.hf_quantizer = _Offer()  # type: ignore[attr-defined, unused-ignore]


def note(model: nn.Module) -> None:
    """Have the configs of the Transformers models in a model say which layers are block-sparse."""
    outermost: list[str] = []
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        if any(name.startswith(other) for other in outermost):
            continue
        outermost.append(f"{name}." if name else "")
        _note(part, {name: layer.topology for name, layer in sparse_layers(part)})


def _note(model: PreTrainedModel, topologies: Mapping[str, BlockTopology]) -> None:
    for part in _pretrained(model):
        if _noted(part.config):
            del part.config.quantization_config
        conversions = vars(part).get("_weight_conversions")
        if isinstance(conversions, _Kept):
            vars(part)["_weight_conversions"] = conversions.whole
    if topologies:
        model.config.quantization_config = BlockSparseConfig.of(topologies)


def _noted(config: Any) -> bool:
    """Tell whether a config says that layers are block-sparse."""
    noted = getattr(config, "quantization_config", None)
    if isinstance(noted, Mapping):
        return noted.get("quant_method") == METHOD
    return isinstance(noted, BlockSparseConfig)


def _pretrained(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _version(text: str) -> tuple[int, ...]:
    """Return major and minor, as of "5.4.0.dev0"."""
    return tuple(int(part) for part in text.split(".")[:2])


def _given_state_dict() -> dict[str, Any] | None:
    """Return the `state_dict` that `save_pretrained` was called with, as an average of weights.

    Transformers asks the quantizer in its place, and does not hand it over.
    """
    frame = sys._getframe(2)
    return frame.f_locals.get("state_dict") if frame.f_code.co_name == "save_pretrained" else None


class _Kept(list[Any]):
    """What saving undoes of the conversions of weights; `whole` is that without blocks."""

    whole: list[Any] | None


def _keep_whole(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Keep blocks out of what Transformers does to weights in saving, as to join those of layers.

    It stores some models as their authors did. Renaming does no harm to blocks; joining, splitting
    and permuting do. So these are left out, which loading understands.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return  # Transformers 4 stores weights as they are.

    conversions = own = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # As Transformers has it for a model that was not loaded.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if type(each).__name__ != "PrefixChange"]
    keys = [f"{name}.{piece}" for name in layers for piece in ("weight", "bias", "_extra_state")]

    def spares(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return True
        undone = conversion.reverse_transform()
        return not any(undone.rename_source_key(key)[1] for key in keys)

    kept = _Kept(each for each in conversions if spares(each))
    if len(kept) < len(conversions):
        kept.whole = own
        vars(model)["_weight_conversions"] = kept
