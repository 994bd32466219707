"""Integrations with Hugging Face's Transformers, loaded only together with Transformers.

`transformers` drives a `Sparsifier` from the `Trainer`, and is imported when its callback is first
accessed, with `reporters`, which serves the Trainer's loggers, and `notices`, which tells its user
what a training does. `pretrained` makes `save_pretrained` and `from_pretrained` support
block-sparse layers; it is imported as soon as Transformers is.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparse_lightning import patching

if TYPE_CHECKING:
    from sparse_lightning.integrations.transformers import SparsityTrainerCallback

__all__ = ["SparsityTrainerCallback"]

# Every model class of Transformers needs this module.
_MODELS = "transformers.modeling_utils"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module("sparse_lightning.integrations.transformers")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("transformers", "accelerate"):
            raise
        raise ImportError(
            f"`{name}` needs transformers and accelerate; {package} is not installed. "
            "Run `pip install 'transformers[torch]'`.",
            name=package,
        ) from error
    return getattr(module, name)


def connect_transformers() -> None:
    """Make Transformers save and load block-sparse layers, now or when it is imported."""
    patching.layer_change_hooks.append(_update_pretrained)
    _update_pretrained()
    sys.meta_path.insert(0, _TransformersImportHook())


def _update_pretrained(model: Any = None) -> None:
    """Import `pretrained` if Transformers is imported, and update a changed model's configs."""
    if _MODELS not in sys.modules:
        return
    try:
        pretrained = import_module("sparse_lightning.integrations.pretrained")
    except ImportError as error:
        warnings.warn(
            "`save_pretrained` must not be called for models with block-sparse layers, as this "
            f"version of transformers cannot load them: {error}. Upgrade it to 5.4 or later.",
            stacklevel=2,
        )
        return
    if model is not None:
        pretrained.update_configs(model)


class _TransformersImportHook(MetaPathFinder):
    """Imports `pretrained` right after Transformers, if that is imported after this package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_update(module: ModuleType) -> None:
            execute(module)
            _update_pretrained()

        spec.loader.exec_module = execute_and_update  # type: ignore[method-assign]
        return spec
