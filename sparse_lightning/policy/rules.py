"""Update rules: which blocks are present after a topology update.

A rule owns the whole decision. `DropAndGrow` is the one that a training has unless it is given
another; it asks two criteria for scores. A rule of one's own is any function of an `UpdateRequest`
that returns a `Decision`; `criteria.needs` says what has to be gathered for it. If it has
`state_dict` and `load_state_dict`, what they return (tensors and primitives) is in the checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_lightning.policy.criteria import BlockScores, Criterion, needed_by, score
from sparse_lightning.policy.evolution import exchange_blocks
from sparse_lightning.policy.lookup import calling


@dataclass(frozen=True)
class UpdateRequest:
    """What a rule decides on.

    Attributes:
        step: steps of the layers' optimizer so far.
        number: updates so far, this one included.
        density: scheduled density of the model, in (0, 1].
        fraction: share of the blocks to exchange, in [0, 1].
        floor: blocks that each block row and each block column shall hold.
        layers: what is known of the blocks of each layer that may change, by name.
        capacities: the most blocks that each of these layers can hold.
        budgets: from drop scores of these layers (read only where layers compete, under the
            "global" distribution) to the number of blocks that each shall have.
    """

    step: int
    number: int
    density: float
    fraction: float
    floor: tuple[int, int]
    layers: Mapping[str, BlockScores]
    capacities: Mapping[str, int]
    budgets: Callable[[Mapping[str, Tensor]], Mapping[str, int]]


@dataclass(frozen=True)
class Decision:
    """What a rule has decided.

    Attributes:
        masks: bool `[out_blocks, in_blocks]`, the blocks that shall be present, by layer. A layer
            that is left out stays as it is.
        drop_scores: of the same shapes, what blocks were kept for; for those who look on.
    """

    masks: Mapping[str, Tensor]
    drop_scores: Mapping[str, Tensor] = field(default_factory=dict)


UpdateRule = Callable[[UpdateRequest], Decision]


class DropAndGrow:
    """Keep the blocks of highest drop score, and grow those of highest grow score for the others.

    Args:
        drop: scores present blocks.
        grow: scores the others; None for no growth.
        regrow: whether a block that was just dropped may be grown again.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1; Mocanu et al. 2018 (SET) with
    random growth.
    """

    def __init__(self, drop: Criterion, grow: Criterion | None, regrow: bool = True) -> None:
        self.drop, self.grow, self.regrow = drop, grow, regrow
        self.needs = needed_by([drop, grow])
        # Of layers that are to have fewer blocks, and none in place of others.
        self.needs_to_drop = needed_by([drop])

    def __call__(self, request: UpdateRequest) -> Decision:
        """Decide an update of every layer."""
        layers = request.layers
        drop = {name: _asked("drop", self.drop, scores) for name, scores in layers.items()}
        budgets = request.budgets(drop)
        masks = {}
        for name, scores in layers.items():
            grows = request.fraction > 0 or budgets[name] > int(scores.mask.sum())
            grow = self.grow if grows else None
            masks[name] = exchange_blocks(
                scores.mask,
                drop[name],
                None if grow is None else _asked("grow", grow, scores),
                budgets[name],
                request.fraction,
                floor=request.floor,
                regrow=self.regrow,
            )
        return Decision(masks, drop)


def _asked(argument: str, criterion: Criterion, scores: BlockScores) -> Tensor:
    """Return what a criterion says of a layer, which is named in what goes wrong."""
    try:
        with calling(argument):
            return score(argument, criterion, scores)
    except ValueError as error:
        raise ValueError(f"{error} (layer '{scores.layer}')") from error
    except RuntimeError as error:
        if error.__cause__ is None:  # it is none of the function's own mistakes
            raise
        raise RuntimeError(f"{error} (layer '{scores.layer}')") from error


def check_decision(decision: Any, scores: Mapping[str, BlockScores]) -> None:
    """Raise unless a rule has decided on layers that it was asked about."""
    wrong = decision if not isinstance(decision, Decision) else decision.masks
    if wrong is decision or not isinstance(wrong, Mapping):
        what = "" if wrong is decision else ", whose masks are by layer"
        raise TypeError(
            f"`rule` must return a Decision{what}; got {type(wrong).__name__}. "
            "Return sparse_lightning.policy.rules.Decision(masks)."
        )
    for name, mask in decision.masks.items():
        if name not in scores:
            raise ValueError(
                f"`rule` must decide on layers of the request; got '{name}', which is none of them."
            )
        if not isinstance(mask, Tensor) or mask.is_meta or not mask.any():
            raise ValueError(
                f"`rule` must leave every layer a block, by a mask; got none (layer '{name}')."
            )


def check_rule(rule: object) -> None:
    """Raise unless a rule that has a state can also take it back."""
    if hasattr(rule, "state_dict") == hasattr(rule, "load_state_dict"):
        if hasattr(rule, "state_dict"):
            check_is_data(rule.state_dict())
        return
    raise ValueError(
        "`rule` must have both `state_dict` and `load_state_dict`, or neither; got one of them on "
        f"{type(rule).__name__}."
    )


def check_is_data(state: object) -> None:
    """Raise TypeError unless it is of tensors and primitives, which `torch.load` takes as data."""
    if isinstance(state, Mapping) and type(state) in (dict, OrderedDict):
        for key, value in state.items():
            check_is_data(key)
            check_is_data(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            check_is_data(value)
    elif not (state is None or isinstance(state, (bool, int, float, str, Tensor))):
        raise TypeError(
            "`rule.state_dict()` must return tensors and primitives, in dicts, lists and tuples; "
            f"got {type(state).__name__}. Convert it, and back in `load_state_dict`."
        )
