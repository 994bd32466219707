"""What a swap did: the layers of a model, its copies, and the share that stays dense."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_lightning.linear import BlockSparseLinear, is_conv1d
from sparse_lightning.names import group_similar, list_names, merge_similar
from sparse_lightning.nm_pattern import kept_share
from sparse_lightning.policy.dead_features import DeadFeatures
from sparse_lightning.tables import html_table, range_of, text_table
from sparse_lightning.topology import BlockTopology, count_dead

# What features without a block are called, wherever they are shown.
DEAD_FEATURES = ("dead outputs", "unread inputs")
# What the share of weights is called where it is not the density, wherever it is shown.
WEIGHT_DENSITY = "weight density"

_EXPERTS = "3-D parameters (experts)"
# The first entry that contains the class of a parameter's module names the parameter's kind.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "embeddings"),
    ((nn.modules.conv._ConvNd,), "convolutions"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers"),
)
_MAX_EXPERT_NAMES = 3


@dataclass(frozen=True)
class LayerReport:
    """One block-sparse layer: what its blocks cover, now.

    Attributes:
        shape: (out_features, in_features).
        block_size: 16, 32, 64 or 128.
        n_blocks: number of present blocks.
        density: present blocks / all blocks.
        parameters_before: parameters of the dense layer, with its bias.
        parameters_after: `weights`, and the bias.
        dead_outputs: output features whose block rows have no block, so that they are constant.
        unread_inputs: input features whose block columns have no block.
        weights: number of weights in present blocks; of 2:4 sparse ones, those that are kept.
        nm: "2:4" if two of each four weights within blocks are kept; None if blocks are whole.
    """

    shape: tuple[int, int]
    block_size: int
    n_blocks: int
    density: float
    parameters_before: int
    parameters_after: int
    dead_outputs: int
    unread_inputs: int
    weights: int
    nm: str | None

    @property
    def weight_density(self) -> float:
        """Kept weights / all weights, which is `density` if blocks are whole."""
        return self.weights / (self.shape[0] * self.shape[1])

    @classmethod
    def from_topology(cls, topology: BlockTopology, bias: Tensor | None) -> LayerReport:
        """Describe a layer with these blocks and this bias."""
        size, n_bias = topology.block_size, 0 if bias is None else bias.numel()
        dead_rows, dead_columns = count_dead(topology.mask)
        weights = topology.n_blocks * topology.weights_per_block
        return cls(
            shape=(topology.out_features, topology.in_features),
            block_size=size,
            n_blocks=topology.n_blocks,
            density=topology.density,
            parameters_before=topology.out_features * topology.in_features + n_bias,
            parameters_after=weights + n_bias,
            dead_outputs=dead_rows * size,
            unread_inputs=dead_columns * size,
            weights=weights,
            nm=topology.nm,
        )

    @classmethod
    def from_layer(cls, layer: BlockSparseLinear) -> LayerReport:
        """Describe a block-sparse layer."""
        return cls.from_topology(layer.topology, layer.bias)


@dataclass(frozen=True)
class Coverage:
    """How much of a model's parameters its block-sparse layers cover.

    Attributes:
        parameters: number of parameters of the dense model. A block-sparse layer counts as the
            `nn.Linear` that it replaces, shared parameters count once, and frozen ones count too.
        share: share of `parameters` in the weights of block-sparse layers, in [0, 1].
        dense: share of each kind of dense parameter, largest first: "embeddings", "convolutions",
            "recurrent layers", "attention in_proj", "3-D parameters (experts)", "linear layers"
            (their weights), and "other" (biases, norms and everything else).
        experts: names of the 3-D parameters, with "*" for numbers, largest first.
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
        names = ", ".join(self.experts[:_MAX_EXPERT_NAMES])
        names += ", …" if len(self.experts) > _MAX_EXPERT_NAMES else ""
        kinds = [
            f"{kind} {_percent(share)}" + (f" ({names})" if kind == _EXPERTS else "")
            for kind, share in self.dense.items()
            if share >= 0.01
        ]
        return f"{text}; dense: {', '.join(kinds)}." if kinds else f"{text}."


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsify` did.

    Attributes:
        layers: the block-sparse layers, without copies.
        skipped: why each of the other linear layers stayed dense.
        follows: the block-sparse layers that are copies, `{copy: source}`.
        coverage: the share of the model that is block-sparse, and the kinds of dense parameters.
        unfused: why MLPs of block-sparse layers do not compute as one op, by name.
        dead: layers to which the planned density leaves dead outputs or unread inputs.
        trained: layers whose weights looked trained, and which kept random blocks of them.
        final_density: density of the layers at the end of the density schedule; None without one.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None
    unfused: dict[str, str] = field(default_factory=dict)
    dead: Mapping[str, DeadFeatures] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    final_density: float | None = None

    @property
    def dead_note(self) -> str:
        """Sentences about planned dead outputs and unread inputs if there are any, else ""."""
        dead = {name: entry for name, entry in self.dead.items() if name in self.layers}
        return describe_dead_features(dead) if dead else ""

    @property
    def coverage_note(self) -> str:
        """A sentence about the coverage if most of the model stays dense, else ""."""
        is_mostly_dense = self.coverage is not None and self.coverage.share < 0.5
        return f"{self.coverage}" if is_mostly_dense else ""

    @property
    def density(self) -> float:
        """Share of the weights that are in present blocks, over all swapped layers."""
        present = sum(r.n_blocks * r.block_size**2 for r in self.layers.values())
        return present / max(1, self._dense_weights)

    @property
    def weight_density(self) -> float:
        """Kept weights / all weights, over all swapped layers.

        It is less than `density` if blocks keep only some of their weights.
        """
        return sum(r.weights for r in self.layers.values()) / max(1, self._dense_weights)

    @property
    def _dense_weights(self) -> int:
        return sum(r.shape[0] * r.shape[1] for r in self.layers.values())

    @property
    def has_patterns(self) -> bool:
        """Whether blocks of any layer keep only some of their weights."""
        return any(r.nm is not None for r in self.layers.values())

    @property
    def density_text(self) -> str:
        """The density, followed by the final one while that differs, as in the progress bar."""
        return _falling(self.density, self.final_density)

    @property
    def weight_density_text(self) -> str:
        """The same for the share of weights; the final one is known if layers are alike in it."""
        kept = {kept_share(r.nm) for r in self.layers.values()}
        final = None
        if self.final_density is not None and len(kept) == 1:
            final = self.final_density * kept.pop()
        return _falling(self.weight_density, final)

    def table(self) -> tuple[Sequence[str], Sequence[tuple[str, ...]]]:
        """Return a header and rows of cells, followed by a row of totals.

        Layers whose names differ only in numbers, and that have the same shape and block size,
        share a row with their sums; there is a column for their number then. There are columns of
        dead outputs and of unread inputs if a layer has some, and of the share of weights if blocks
        keep only some of theirs.
        """
        groups = group_similar(
            (name, (r.shape, r.block_size, r.nm)) for name, r in self.layers.items()
        )
        is_repeated = any(len(names) > 1 for _, names, _ in groups)
        reports = [*self.layers.values()]
        dead = [bool(sum(kind)) for kind in _dead_features(reports)]

        def sums(layers: Sequence[LayerReport]) -> list[str]:
            counts = [
                sum(n) for n, shown in zip(_dead_features(layers), dead, strict=True) if shown
            ]
            counts.append(sum(r.parameters_after for r in layers))
            counts.append(sum(r.parameters_before for r in layers))
            return [f"{count:,}" for count in counts]

        def number(count: int) -> list[str]:
            return [f"{count}"] if is_repeated else []

        def share(text: str) -> list[str]:
            return [text] if self.has_patterns else []

        titles = [title for title, shown in zip(DEAD_FEATURES, dead, strict=True) if shown]
        header = ("layer", *(["number"] if is_repeated else []), "shape", "blocks", "density",
                  *share(WEIGHT_DENSITY), *titles, "parameters", "before")  # fmt: skip
        rows = []
        for label, names, ((out_features, in_features), size, nm) in groups:
            layers = [self.layers[name] for name in names]
            rows.append(
                (
                    label,
                    *number(len(layers)),
                    f"{out_features}x{in_features}",
                    f"{sum(r.n_blocks for r in layers):,} of {blocks_text(size, nm)}",
                    range_of(f"{r.density:.3f}" for r in layers),
                    *share(range_of(f"{r.weight_density:.3f}" for r in layers)),
                    *sums(layers),
                )
            )
        shares = self.density_text, *share(self.weight_density_text)
        rows.append(("total", *number(len(reports)), "", "", *shares, *sums(reports)))
        return header, rows

    def left_dense(self) -> list[tuple[str, str]]:
        """Return which linear layers stayed dense, and why; repeated layers are named together."""
        return [
            (label if number == "1" else f"{label} ({number} layers)", reason)
            for label, number, reason in merge_similar(
                (name, (reason,)) for name, reason in self.skipped.items()
            )
        ]

    def __str__(self) -> str:
        table = text_table(*self.table(), total=True)
        return "\n\n".join([f"Block-sparse layers\n{table}", *self._paragraphs()])

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        notes = [f"<p>{html.escape(text)}</p>" for text in self._paragraphs()]
        return "".join([html_table(*self.table(), total=True), *notes]).replace("\n", "<br>")

    def _paragraphs(self) -> list[str]:
        """Return what the report says besides the table."""
        lists = {
            "Copies": [f"{copy} follows {source}" for copy, source in self.follows.items()],
            "Left dense": [f"{names}: {reason}" for names, reason in self.left_dense()],
            "MLPs whose layers run one by one": [f"{n}: {why}" for n, why in self.unfused.items()],
        }
        paragraphs = ["\n".join([title, *lines]) for title, lines in lists.items() if lines]
        return [*paragraphs, *filter(None, (self.dead_note, self.coverage_note))]


def blocks_text(block_size: int, nm: str | None) -> str:
    """Return the size of blocks, and their pattern if they have one.

    >>> blocks_text(16, None), blocks_text(16, "2:4")
    ('16x16', '16x16 at 2:4')
    """
    size = f"{block_size}x{block_size}"
    return size if nm is None else f"{size} at {nm}"


def _falling(now: float, final: float | None) -> str:
    """Return a density, followed by the final one if that is known and differs."""
    first, last = f"{now:.3f}", f"{now if final is None else final:.3f}"
    return first if first == last else f"{first} → {last}"


def _dead_features(layers: Sequence[LayerReport]) -> tuple[list[int], list[int]]:
    """Return the numbers of dead outputs and of unread inputs of layers, as in `DEAD_FEATURES`."""
    return [r.dead_outputs for r in layers], [r.unread_inputs for r in layers]


def describe_dead_features(dead: Mapping[str, DeadFeatures]) -> str:
    """Return sentences that name layers with dead outputs or unread inputs, and what avoids them.

    >>> entry = DeadFeatures((512, 64), outputs=256, inputs=0, density=0.5, block_size=16)
    >>> print(describe_dead_features({"layers.0.up": entry, "layers.1.up": entry}).split(": ")[1])
    'layers.*.up', 2 layers (at least 256 of 512 each; density 0.5 or block size 16 would do). Set \
a higher `density` or `layer_density`, or a smaller `block_size`, or `exclude` them.
    """
    kinds = (
        ("Dead outputs, which are constant", [(d.outputs, d.shape[0]) for d in dead.values()]),
        ("Unread inputs, which have no effect", [(d.inputs, d.shape[1]) for d in dead.values()]),
    )
    sentences = [
        "The planned density leaves block-sparse layers too few blocks for their features."
    ]
    for kind, counts in kinds:
        rows = [
            (name, (f"{n:,} of {total:,}", _remedy(entry)))
            for (name, entry), (n, total) in zip(dead.items(), counts, strict=True)
            if n
        ]
        layers = [
            f"'{name}' (at least {share}; {remedy})"
            if number == "1"
            else f"'{name}', {number} layers (at least {share} each; {remedy})"
            for name, number, share, remedy in merge_similar(rows)
        ]
        if layers:
            sentences.append(f"{kind}: {'; '.join(layers)}.")
    sentences.append(
        "Set a higher `density` or `layer_density`, or a smaller `block_size`, or `exclude` them."
    )
    return " ".join(sentences)


def describe_trained(names: Sequence[str]) -> str:
    """Return sentences that name layers with random blocks of trained weights, and the remedy.

    >>> print(describe_trained(["up", "down"]).split(". ")[0])
    Block-sparse layers start with random blocks of weights that look trained: up, down
    """
    return (
        "Block-sparse layers start with random blocks of weights that look trained: "
        f"{list_names(names)}. What their other blocks had learnt is lost. In a training, let "
        "the density fall from 1, so that the network adapts while blocks go: set "
        "`init='magnitude'` and `density=DensitySchedule(initial=1.0, final=0.25)`, or with Hydra "
        "`callbacks/sparsity=finetune`."
    )


def _remedy(dead: DeadFeatures) -> str:
    block_size = "" if dead.block_size is None else f" or block size {dead.block_size}"
    return f"density {dead.density:g}{block_size} would do"


def measure_coverage(model: nn.Module) -> Coverage:
    """Return how much of a model its block-sparse layers cover, and what stays dense.

    Args:
        model: any module; its parameters may be on the meta device. Lazy parameters that are not
            yet initialized have no size and do not count.

    >>> model = nn.Sequential(
    ...     nn.Embedding(100, 32), BlockSparseLinear(32, 96, bias=False, density=0.5, block_size=16)
    ... )
    >>> print(measure_coverage(model))
    Block-sparse layers cover 49 % of the model's 6,272 parameters; dense: embeddings 51 %.
    """
    sizes: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    sparse = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            continue
        # A parametrized weight is stored in a submodule of the module that it belongs to.
        owner, is_parametrized, rest = name.partition(".parametrizations.")
        if is_parametrized:
            local_name = rest.partition(".")[0]
        else:
            owner, _, local_name = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, BlockSparseLinear) and local_name == "values":
            sparse += module.out_features * module.in_features
            continue
        kind = _kind_of(module, local_name, tuple(parameter.shape))
        sizes[kind] += parameter.numel()
        if kind == _EXPERTS:
            experts[re.sub(r"(?<![^.])\d+(?![^.])", "*", name)] += parameter.numel()
    total = sparse + sizes.total()
    dense = {kind: n / total for kind, n in sizes.most_common() if n}
    names = tuple(name for name, _ in experts.most_common())
    return Coverage(total, sparse / max(1, total), dense, names)


def _kind_of(module: nn.Module, name: str, shape: tuple[int, ...]) -> str:
    """Return the kind of a dense parameter.

    Args:
        module: module that owns the parameter.
        name: name of the parameter in that module.
        shape: shape of the parameter. Dimensions of size 1 are ignored, so that the position
            embeddings of a vision transformer, `[1, n, d]`, do not count as experts.
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
