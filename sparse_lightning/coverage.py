"""How much of a model its block-sparse layers stand for, and what stays dense."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from sparse_lightning.linear import BlockSparseLinear, is_conv1d

_EXPERTS = "3-D parameters (experts)"
# The first that fits names the kind of a parameter by the module that has it.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "embeddings"),
    ((nn.modules.conv._ConvNd,), "convolutions"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers"),
)
_NAMES = 3  # of the experts' parameters, in a line


@dataclass(frozen=True)
class Coverage:
    """How much of a model's parameters lies in its block-sparse layers.

    Attributes:
        parameters: of the dense model: a block-sparse layer counts as the `nn.Linear` in whose
            place it stands, a parameter with several names once, frozen ones too.
        share: of them, in [0, 1], the weights of block-sparse layers.
        dense: from each kind of what is dense to its share, largest first: "embeddings",
            "convolutions", "recurrent layers", "attention in_proj", "3-D parameters (experts)",
            "linear layers" (their weights), and "other" (biases, norms and all else).
        experts: names of the 3-D parameters, with "*" for numbers, the largest first.
    """

    parameters: int
    share: float
    dense: dict[str, float]
    experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"Block-sparse layers cover {_percent(self.share)} of the model's "
            f"{self.parameters:,} parameters"
        )
        names = ", ".join(self.experts[:_NAMES]) + (", …" if len(self.experts) > _NAMES else "")
        kinds = [
            f"{kind} {_percent(share)}" + (f" ({names})" if kind == _EXPERTS else "")
            for kind, share in self.dense.items()
            if share >= 0.01
        ]
        return f"{text}; dense are {', '.join(kinds)}." if kinds else f"{text}."


def coverage(model: nn.Module) -> Coverage:
    """Return how much of a model its block-sparse layers stand for, and what stays dense.

    Args:
        model: any module; its parameters may be on meta. Those of lazy modules that have not seen
            an input have no size yet, and do not count.

    >>> model = nn.Sequential(
    ...     nn.Embedding(100, 32), BlockSparseLinear(32, 96, bias=False, density=0.5, block_size=16)
    ... )
    >>> str(coverage(model))
    "Block-sparse layers cover 49 % of the model's 6,272 parameters; dense are embeddings 51 %."
    """
    sizes: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    sparse = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            continue
        # A parametrized weight lies in a module of its own, within that which has it.
        owner, parametrized, of = name.partition(".parametrizations.")
        if parametrized:
            own = of.partition(".")[0]
        else:
            owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, BlockSparseLinear) and own == "values":
            sparse += module.out_features * module.in_features
            continue
        kind = _kind(module, own, tuple(parameter.shape))
        sizes[kind] += parameter.numel()
        if kind == _EXPERTS:
            experts[re.sub(r"(?<![^.])\d+(?![^.])", "*", name)] += parameter.numel()
    total = sparse + sizes.total()
    dense = {kind: n / total for kind, n in sizes.most_common() if n}
    names = tuple(name for name, _ in experts.most_common())
    return Coverage(total, sparse / max(1, total), dense, names)


def _kind(module: nn.Module, name: str, shape: tuple[int, ...]) -> str:
    """Return the kind of a dense parameter.

    Args:
        module: that has it.
        name: that it has there.
        shape: dimensions of 1 do not count, so that the positions of a vision transformer,
            `[1, n, d]`, are not taken for experts.
    """
    for classes, kind in _KINDS:
        if isinstance(module, classes):
            return kind
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "attention in_proj"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear layers" if name == "weight" else "other"
    return _EXPERTS if sum(n > 1 for n in shape) >= 3 else "other"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or not share else "less than 1 %"
