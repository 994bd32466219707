"""Support for block-sparse layers in Transformers' `save_pretrained` and `from_pretrained`.

Block sparsity is registered as a quantization method, "block_sparse": `config.json` describes the
block-sparse layers, so that `from_pretrained` creates them before it loads their blocks. Importing
this module registers the method.

The files store the blocks of a layer as `<layer>.weight`, a tensor of three dimensions, next to the
topology. A program that does not import this package therefore fails because of the weight's shape.
If the tensor had another name, the weight would count as missing and be initialized at random.
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
from sparse_lightning.loading import convert_layers
from sparse_lightning.patching import densify
from sparse_lightning.selection import sparse_layers
from sparse_lightning.topology import BlockTopology, block_grid

_METHOD = "block_sparse"
_MIN_VERSION_TO_LOAD = "5.4"


@register_quantization_config(_METHOD)
class BlockSparseConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """Description of block-sparse layers in `config.json`.

    Args:
        layers: "block_size", "capacity" and "shape", [out_features, in_features], of each layer, by
            name; and "nm" of 2:4 sparse ones.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], **_: Any) -> None:
        self.quant_method: Any = _METHOD
        self.layers = {name: dict(sizes) for name, sizes in layers.items()}

    @classmethod
    def from_topologies(cls, topologies: Mapping[str, BlockTopology]) -> BlockSparseConfig:
        """Describe the layers that have these topologies, by name."""
        return cls(
            {
                name: {
                    "block_size": topology.block_size,
                    "capacity": topology.capacity,
                    "shape": [topology.out_features, topology.in_features],
                    **({} if topology.nm is None else {"nm": topology.nm}),
                }
                for name, topology in topologies.items()
            }
        )

    def empty_topology(self, name: str) -> BlockTopology:
        """Return a topology of a layer's sizes with empty slots; loading fills them later."""
        sizes = self.layers[name]
        try:
            out_features, in_features = sizes["shape"]
            grid = block_grid(out_features, in_features, sizes["block_size"])
            coords = torch.full((sizes["capacity"], 2), -1, dtype=torch.int32, device="cpu")
            topology = BlockTopology(coords, grid, sizes["block_size"])
            return topology.with_first_positions(sizes.get("nm"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "`quantization_config` must give block_size, capacity and shape of each layer, "
                f"and nm only as '2:4'; got {sizes} (layer '{name}'). The folder's config.json is "
                "damaged; save the model again with save_pretrained."
            ) from error


@register_quantizer(_METHOD)
class BlockSparseQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Callbacks with which Transformers saves and loads a model with block-sparse layers."""

    quantization_config: BlockSparseConfig

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Names of `values` parameters, by the names of weights in the files.
        self._values_of_weights: dict[str, str] = {}
        # Dtypes that the parameters must have after loading.
        self._dtypes: dict[str, torch.dtype] = {}
        self._renaming: Any = None
        # Names in the files, with weights renamed to `values`.
        self._names_in_files: set[str] = set()

    # Saving.

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *_: Any
    ) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Return the state dict to write, and update the model's config to describe it."""
        state_dict = _state_dict_argument()
        if getattr(model, "_hf_peft_config_loaded", False):
            return state_dict, {}  # Transformers then writes the adapters alone, without a config.
        if state_dict is None:
            state_dict = model.state_dict()
        layers = layers_in(state_dict)
        _update_config(model, {name: layer.topology for name, layer in layers.items()})
        _drop_conversions_of_blocks(model, layers)
        weights = {f"{name}.values": f"{name}.weight" for name in layers}
        return {weights.get(key, key): value for key, value in state_dict.items()}, {}

    # Loading.

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not _version(transformers.__version__) >= _version(_MIN_VERSION_TO_LOAD):
            raise RuntimeError(
                f"`transformers` must be {_MIN_VERSION_TO_LOAD} or later to load block-sparse "
                "layers, as earlier versions load no extra states; got "
                f"{transformers.__version__}. Upgrade it."
            )
        if not self.pre_quantized:
            raise ValueError(
                "`quantization_config` must not be given for a dense model; got a "
                "BlockSparseConfig. Load the model without it, and call sparsify(model)."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        modules = dict(model.named_modules(remove_duplicate=False))
        base = f"{model.base_model_prefix}."
        topologies: dict[str, BlockTopology | None] = {}
        for saved in self.quantization_config.layers:
            # A base model may be loaded from the folder of a model with a head, or the other way
            # around. Transformers reports weights that the model lacks, such as another head's.
            names = (saved, saved.removeprefix(base), base + saved)
            name = next((name for name in names if name in modules), None)
            if name is None:
                continue
            topologies[name] = self.quantization_config.empty_topology(saved)
            for variant in (name, name.removeprefix(base), base + name):
                self._values_of_weights[f"{variant}.weight"] = f"{variant}.values"
        convert_layers(model, topologies)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for _, layer in sparse_layers(model):
            # Transformers initializes modules that the files lack, and may access the weights of
            # other layers to do so. This placeholder is marked as initialized already.
            shape = (layer.out_features, layer.in_features)
            placeholder = torch.empty(shape[::-1] if layer._is_transposed else shape, device="meta")
            placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
            vars(layer)["weight"] = placeholder
        return model

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        values_of_weights, names_in_files = self._values_of_weights, self._names_in_files

        class RenameToValues(WeightRenaming):  # type: ignore[misc, unused-ignore]
            """Renames the weights of block-sparse layers to `values`."""

            __slots__ = ()

            def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
                key = values_of_weights.get(source_key, source_key)
                names_in_files.add(key)
                return key, None

        self._renaming = RenameToValues("", "")  # Unlike other renamings it needs no patterns.
        return [self._renaming]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name, parameter in model.named_parameters():
            # Transformers before 5.22 does not convert the parameters from the files' dtype.
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        base = f"{model.base_model_prefix}."
        for name, layer in sparse_layers(model):
            vars(layer).pop("weight", None)
            if layer.values.device.type == "meta":
                raise ValueError(
                    "`device_map` must keep block-sparse layers on the devices that compute them, "
                    "as their topology cannot be offloaded; got an offloaded layer (layer "
                    f"'{name}'). Omit it, or assign the layer to a device that computes it."
                )
            topology = layer.topology
            shapes = {
                "values": topology.values_shape,
                "bias": (topology.out_features,),
            }
            loaded = {
                key
                for key, parameter in layer.named_parameters()
                if hasattr(parameter, "_is_hf_initialized") and parameter.shape == shapes[key]
            }
            variants = (name, name.removeprefix(base), base + name)
            if any(f"{variant}._extra_state" in self._names_in_files for variant in variants):
                loaded.add("_extra_state")
            for key in layer.state_dict():
                if key not in loaded:
                    saved = "weight" if key == "values" else key
                    raise ValueError(
                        f"The files must hold '{name}.{saved}' in the shape that the config gives; "
                        f"got none, or one of another shape (layer '{name}'). Save the model again "
                        "with save_pretrained."
                    )
            layer.to(layer.values.device)  # Moves the topology to the device of the values.
        # Saving reverts the conversions in this list. It must not revert the renaming.
        conversions = vars(model).get("_weight_conversions")
        if conversions is not None:
            remaining = [c for c in conversions if c is not self._renaming]
            vars(model)["_weight_conversions"] = remaining
        # Unlike a quantized model, this one may be cast, trained and saved like any other.
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(attribute, None)
        for part in _pretrained_parts(model):
            vars(part.config).pop("_is_quantized", None)
        update_configs(model)
        return model

    # Capabilities.

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
        update_configs(model)


class _QuantizerDescriptor:
    """Provides `hf_quantizer` on every model that has block-sparse layers.

    As a descriptor it is not stored in models, and so not in their copies or pickles either.
    """

    def __get__(self, model: PreTrainedModel | None, owner: type) -> BlockSparseQuantizer:
        # A config may still describe layers that no longer exist; saving corrects it.
        if model is not None and (_describes_layers(model.config) or any(sparse_layers(model))):
            topologies = {name: layer.topology for name, layer in sparse_layers(model)}
            return BlockSparseQuantizer(BlockSparseConfig.from_topologies(topologies))
        raise AttributeError(f"'{owner.__name__}' object has no attribute 'hf_quantizer'")


PreTrainedModel.hf_quantizer = _QuantizerDescriptor()  # type: ignore[attr-defined, unused-ignore]


def update_configs(model: nn.Module) -> None:
    """Describe the block-sparse layers of a model in the configs of its Transformers models."""
    outermost: list[str] = []
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        if any(name.startswith(prefix) for prefix in outermost):
            continue
        outermost.append(f"{name}." if name else "")
        _update_config(part, {name: layer.topology for name, layer in sparse_layers(part)})


def _update_config(model: PreTrainedModel, topologies: Mapping[str, BlockTopology]) -> None:
    for part in _pretrained_parts(model):
        if _describes_layers(part.config):
            del part.config.quantization_config
        conversions = vars(part).get("_weight_conversions")
        if isinstance(conversions, _ReducedConversions):
            vars(part)["_weight_conversions"] = conversions.original
    if topologies:
        model.config.quantization_config = BlockSparseConfig.from_topologies(topologies)


def _describes_layers(config: Any) -> bool:
    """Return whether a config describes block-sparse layers."""
    description = getattr(config, "quantization_config", None)
    if isinstance(description, Mapping):
        return description.get("quant_method") == _METHOD
    return isinstance(description, BlockSparseConfig)


def _pretrained_parts(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _version(text: str) -> tuple[int, ...]:
    """Return major and minor of a version such as "5.4.0.dev0"."""
    return tuple(int(part) for part in text.split(".")[:2])


def _state_dict_argument() -> dict[str, Any] | None:
    """Return the `state_dict` argument of `save_pretrained`, or None.

    If a model has a quantizer, Transformers ignores the argument and does not pass it on, so it is
    read from the caller's frame.
    """
    frame = sys._getframe(2)
    return frame.f_locals.get("state_dict") if frame.f_code.co_name == "save_pretrained" else None


class _ReducedConversions(list[Any]):
    """Weight conversions that saving reverts; `original` also has those that affect blocks."""

    original: list[Any] | None


def _drop_conversions_of_blocks(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Exclude block-sparse layers from the weight conversions that saving reverts.

    Transformers stores some models in their authors' format. Renaming a weight keeps blocks intact,
    but joining, splitting or permuting weights does not, so these conversions are dropped. Loading
    accepts weights that are stored without them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return  # Transformers 4 does not convert weights.

    conversions = original = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # The same list as Transformers uses for a model that was not loaded.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if type(c).__name__ != "PrefixChange"]
    keys = [f"{name}.{key}" for name in layers for key in ("weight", "bias", "_extra_state")]

    def keeps_blocks(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return True
        reverse = conversion.reverse_transform()
        return not any(reverse.rename_source_key(key)[1] for key in keys)

    reduced = _ReducedConversions(c for c in conversions if keeps_blocks(c))
    if len(reduced) < len(conversions):
        reduced.original = original
        vars(model)["_weight_conversions"] = reduced
