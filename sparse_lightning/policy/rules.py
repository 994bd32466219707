"""Update rules, which decide the blocks that are present after a topology update.

The default rule, `DropAndGrow`, uses one criterion to drop blocks and one to grow them. A
user-defined rule is any function of an `UpdateRequest` that returns a `Decision`; it declares with
`criteria.needs` what must be gathered for it. If a rule has `state_dict` and `load_state_dict`, its
state (tensors and primitives) is saved in checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_lightning.policy.criteria import BlockScores, Criterion, collect_needs, evaluate
from sparse_lightning.policy.lookup import calling
from sparse_lightning.policy.updates import exchange_blocks


@dataclass(frozen=True)
class UpdateRequest:
    """The input of an update rule.

    Attributes:
        step: number of steps that the layers' optimizer has taken.
        number: number of updates, including this one.
        density: scheduled density of the model, in (0, 1].
        fraction: share of the blocks to exchange, in [0, 1].
        floor: minimum number of blocks of each block row and of each block column.
        layers: scores and statistics of each layer that may change, by name.
        capacities: number of slots of each of these layers.
        budgets: function that returns the number of blocks that each of these layers is to have,
            given their drop scores, which only the "global" distribution reads.
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
    """The output of an update rule.

    Attributes:
        masks: bool `[out_blocks, in_blocks]`, the new block masks, by layer. A layer that is left
            out keeps its blocks.
        drop_scores: `[out_blocks, in_blocks]`, the scores by which blocks were kept, by layer; for
            logging only.
    """

    masks: Mapping[str, Tensor]
    drop_scores: Mapping[str, Tensor] = field(default_factory=dict)


UpdateRule = Callable[[UpdateRequest], Decision]


class DropAndGrow:
    """Keep the blocks with the highest drop scores and grow those with the highest grow scores.

    Args:
        drop: criterion that scores present blocks.
        grow: criterion that scores absent blocks; None for no growth.
        regrow: whether an update may grow a block that it has just dropped.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1; Mocanu et al. 2018 (SET) with
    random growth.
    """

    def __init__(self, drop: Criterion, grow: Criterion | None, regrow: bool = True) -> None:
        self.drop, self.grow, self.regrow = drop, grow, regrow
        self.needs = collect_needs([drop, grow])
        # Needs of an update that only drops blocks.
        self.needs_to_drop = collect_needs([drop])

    def __call__(self, request: UpdateRequest) -> Decision:
        """Decide the update of all requested layers."""
        layers = request.layers
        drop = {name: _evaluate("drop", self.drop, scores) for name, scores in layers.items()}
        budgets = request.budgets(drop)
        masks = {}
        for name, scores in layers.items():
            grows = request.fraction > 0 or budgets[name] > int(scores.mask.sum())
            grow = self.grow if grows else None
            masks[name] = exchange_blocks(
                scores.mask,
                drop[name],
                None if grow is None else _evaluate("grow", grow, scores),
                budgets[name],
                request.fraction,
                floor=request.floor,
                regrow=self.regrow,
            )
        return Decision(masks, drop)


def _evaluate(argument: str, criterion: Criterion, scores: BlockScores) -> Tensor:
    """Return a criterion's scores of a layer; errors name the layer."""
    try:
        with calling(argument):
            return evaluate(argument, criterion, scores)
    except ValueError as error:
        raise ValueError(f"{error} (layer '{scores.layer}')") from error
    except RuntimeError as error:
        if error.__cause__ is None:  # `calling` did not raise it; for example, out of memory.
            raise
        raise RuntimeError(f"{error} (layer '{scores.layer}')") from error


def check_decision(decision: Any, scores: Mapping[str, BlockScores]) -> None:
    """Raise unless a rule returned a block mask for layers of the request only."""
    result = decision.masks if isinstance(decision, Decision) else decision
    if result is decision or not isinstance(result, Mapping):
        detail = "" if result is decision else " whose masks are a mapping by layer"
        raise TypeError(
            f"`rule` must return a Decision{detail}; got {type(result).__name__}. "
            "Return sparse_lightning.policy.rules.Decision(masks)."
        )
    for name, mask in decision.masks.items():
        if name not in scores:
            raise ValueError(
                f"`rule` must decide only on layers of the request; got '{name}', which is not one."
            )
        if not isinstance(mask, Tensor) or mask.is_meta or not mask.any():
            raise ValueError(
                f"`rule` must leave every layer at least one block; got none (layer '{name}')."
            )


def check_rule(rule: object) -> None:
    """Raise unless a rule has both `state_dict` and `load_state_dict`, or neither."""
    if hasattr(rule, "state_dict") == hasattr(rule, "load_state_dict"):
        if hasattr(rule, "state_dict"):
            check_is_data(rule.state_dict())
        return
    raise ValueError(
        "`rule` must have both `state_dict` and `load_state_dict`, or neither; got one of them on "
        f"{type(rule).__name__}."
    )


def check_is_data(state: object) -> None:
    """Raise TypeError unless `torch.load(weights_only=True)` accepts a rule's state."""
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
            f"got {type(state).__name__}. Convert it, and convert it back in `load_state_dict`."
        )
