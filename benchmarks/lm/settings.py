"""The settings of a training: everything that its result depends on, besides the device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from quality_tasks import size_label

from lm.models import PATTERNS

DENSE = "dense"

# Keywords of `SparsityCallback` for each rule; `callback_keywords` adds those that all share.
RULES: dict[str, dict[str, Any]] = {
    "static": {"density": {"schedule": "constant"}, "grow": "none"},
    "set": {"density": {"schedule": "constant"}, "grow": "random"},
    "rigl": {"density": {"schedule": "constant"}, "grow": "gradient"},
    # The density falls from 1 by magnitude (Zhu & Gupta 2017), without and with regrowth.
    "cubic": {"density": {"schedule": "cubic", "initial": 1.0, "until": 0.5}, "grow": "none"},
    "cubic-regrow": {
        "density": {"schedule": "cubic", "initial": 1.0, "until": 0.5},
        "grow": "gradient",
    },
    # The same from density .5 (Liu et al. 2021).
    "granet": {"density": {"schedule": "cubic", "initial": 0.5, "until": 0.5}, "grow": "gradient"},
    # The density falls by movement, and layers compete for blocks (Sanh et al. 2020).
    "movement": {
        "density": {"schedule": "cubic", "initial": 1.0, "begin": 0.1, "until": 0.7},
        "distribution": "global",
        "drop": "movement",
        "grow": "none",
    },
}


@dataclass(frozen=True)
class Settings:
    """The settings of a training; equal settings on one device give the same result.

    Attributes:
        data: digest of the tokens.
        vocabulary: number of different tokens.
        model: "gpt" or "llama".
        width, layers, heads: size of the model.
        mlp_width: hidden features of the MLPs, relative to the model's own.
        context, batch: tokens of a window, windows of a step.
        steps: optimizer steps.
        rule: `DENSE`, or a key of `RULES`.
        block_size, density: size of the sparse layers; None if dense, as the next three.
        nm: pattern within blocks, "2:4"; None for whole blocks.
        sparse: which layers are sparse, a key of `PATTERNS`.
        updates: intervals between topology updates per training.
        drop_fraction: share of the blocks that the first update exchanges.
        start: name of the dense training whose weights are the initial ones; None for random ones.
        distill: weight of the divergence from that dense model in the loss, in [0, 1].
        lr: peak learning rate.
        warmup: share of the steps in which it rises.
        seed: seed of the weights, the blocks and the order of the data.
        precision: precision of Lightning's trainer.
        compile: whether the layers are compiled.
        log_every: steps between two points of the curve.
        held_out: held-out windows that each point evaluates.
        is_search: whether the training belongs to the search of a learning rate.
    """

    data: str
    vocabulary: int
    model: str
    width: int
    layers: int
    heads: int
    mlp_width: float
    context: int
    batch: int
    steps: int
    rule: str
    block_size: int | None
    density: float | None
    sparse: str | None
    updates: int | None
    drop_fraction: float | None
    start: str | None
    distill: float
    lr: float
    warmup: float
    seed: int
    precision: str
    compile: bool
    log_every: int
    held_out: int
    is_search: bool
    nm: str | None = None  # has a default because older results lack it

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.batch * self.context

    @property
    def name(self) -> str:
        """Name of the training's files: the rule, the seed, and a hash of all settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return f"{self.model}-{self.rule}-seed{self.seed}-{digest}"

    @property
    def label(self) -> str:
        """Description in tables: what distinguishes variants of a model."""
        parts = [self.rule]
        if self.rule != DENSE:
            assert self.block_size is not None and self.density is not None
            parts.append(size_label(self.block_size, self.density))
        if self.nm is not None:
            parts.append(self.nm)
        if self.sparse == "all":
            parts.append("all layers")
        if self.mlp_width != 1:
            parts.append(f"MLPs {self.mlp_width:g} as wide")
        if self.start is not None:
            parts.append("from dense")
        if self.distill:
            parts.append(f"distilled {self.distill:g}")
        return ", ".join(parts)

    @property
    def variant(self) -> Settings:
        """The same without what a search or another seed varies."""
        return replace(self, lr=0.0, seed=0, steps=0, log_every=0, is_search=False)


def callback_keywords(settings: Settings) -> dict[str, Any]:
    """Return the keywords of `SparsityCallback` for a sparse training.

    Updates run at regular steps until three quarters of the training, and all layers have the same
    density, unless the rule says otherwise.
    """
    assert settings.sparse is not None and settings.updates is not None
    rule = RULES[settings.rule]
    return {
        **rule,
        "include": [PATTERNS[settings.sparse]],
        "density": {**rule["density"], "final": settings.density},
        "block_size": settings.block_size,
        "nm": settings.nm,
        "update": {"every_n_steps": max(1, settings.steps // settings.updates), "until": 0.75},
        "drop_fraction": {"schedule": "cosine", "initial": settings.drop_fraction, "final": 0.0},
        # Trained weights are worth keeping where they are large; random ones need no choice.
        "init": "random" if settings.start is None else "magnitude",
        "seed": settings.seed,
        "monitor": None,
    }
