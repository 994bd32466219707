"""Users of `Sparsifier` for the trainers of other packages.

Each is imported when it is asked for, and so is the package that it is for. `pretrained` has
Transformers' `save_pretrained` and `from_pretrained` know block-sparse layers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_lightning.integrations.transformers import SparsityTrainerCallback

__all__ = ["SparsityTrainerCallback"]


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
