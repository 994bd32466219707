"""The state of every optimizer follows weights within 2:4 sparse blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from sparse_lightning import BlockSparseLinear, Sparsifier
from sparse_lightning.optimizer_state import prepare_reset, warm_start
from sparse_lightning.policy.updates import ModelUpdate
from tests.test_optimizer_state import BY_SHAPE, LR, OPTIMIZERS, STARTS, Toy, state_tensors

ALL: dict[str, Any] = {
    **{
        name: (lambda p, cls=cls, options=options: cls(p, lr=LR, **options))
        for name, (cls, options) in OPTIMIZERS.items()
    },
    **BY_SHAPE,
}


class Flat(Toy):
    """Adam, whose second moment is flattened."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        second = self.mean(state, "exp_avg_sq", g.flatten().square(), 0.99)
        return g / (second / (1 - 0.99 ** state["step"])).sqrt().add_(1e-8).view_as(g)


ALL["flat"] = Flat


def training(
    make: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Sequential, Sparsifier, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48)).to(dtype)
    update = {"every_n_steps": 2, "until": 13}
    options = {"density": 0.5, "drop_fraction": 0.4, "update": update, **options}
    sparsifier = Sparsifier(model, 14, nm="2:4", block_size=16, exclude=(), **options)
    optimizer: Optimizer = make(model.parameters())
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def take_steps(model: nn.Module, optimizer: Optimizer, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(16, 64, generator=generator).to(next(model.parameters()).dtype)
        (model(x) - x[:, :48]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def kept(layer: BlockSparseLinear) -> Tensor:
    return layer.topology.unpack(torch.ones(layer.values.shape, dtype=torch.bool))


@pytest.mark.parametrize("name", ALL)
def test_weights_that_stay_keep_their_state_and_new_ones_begin(name: str) -> None:
    """Compared per place in the dense weight; means over rows or columns stay with their block."""
    density = {"initial": 0.75, "final": 0.4, "schedule": "linear", "begin": 0.0, "until": 0.6}
    model, sparsifier, optimizer = training(ALL[name], density=density)
    initial = {"sum": optimizer.defaults.get("initial_accumulator_value"), **STARTS}
    before: dict[str, Any] = {}
    seen = {"stayed": 0, "new": 0, "means": 0}

    def remember(*_: Any) -> None:
        for of, layer in sparsifier.layers.items():
            states = copy.deepcopy(state_tensors(optimizer, layer.values))
            before[of] = copy.deepcopy(layer.topology), kept(layer), states

    def compare(_: Sparsifier, update: ModelUpdate) -> None:
        for of, change in update.layers.items():
            layer, (topology, mask, states) = sparsifier.layers[of], before[of]
            after = state_tensors(optimizer, layer.values)
            assert after.keys() == states.keys()
            now = kept(layer)
            came = torch.zeros(layer.topology.grid, dtype=torch.bool)
            rows, cols = layer.topology.coords[layer.topology.coords[:, 0] >= 0].long().unbind(1)
            came[rows, cols] = ~topology.mask[rows, cols]
            came = came.repeat_interleave(16, 0).repeat_interleave(16, 1)
            stayed, new = now & mask & ~came, now & (came | ~mask)
            for key, state in after.items():
                start = initial.get(key) or 0.0
                if state.numel() == layer.values.numel():
                    found = layer.topology.unpack(state.view(layer.values.shape))
                    earlier = topology.unpack(states[key].view(topology.values_shape))
                    assert torch.equal(found[stayed], earlier[stayed]), key
                    assert (found[new] == start).all(), key
                    seen["stayed"] += int(stayed.sum())
                    seen["new"] += change.new_weights
                else:
                    places = {tuple(at): slot for slot, at in enumerate(topology.coords.tolist())}
                    for slot, at in enumerate(layer.topology.coords.tolist()):
                        if at[0] >= 0 and tuple(at) in places:
                            earlier = states[key][places[tuple(at)]]
                            assert torch.equal(state[slot], earlier), key
                            seen["means"] += 1
                        elif at[0] >= 0:
                            assert (state[slot] == start).all(), key

    handle = optimizer.register_step_post_hook(remember)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    sparsifier.register_update_hook(compare)
    take_steps(model, optimizer, 14)
    has_state = bool(state_tensors(optimizer, model[0].values))
    assert sparsifier.n_updates == 7 and has_state == (seen["new"] + seen["means"] > 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_implementations_of_adamw_agree(options: dict[str, Any]) -> None:
    def run(**options: Any) -> Tensor:
        model, sparsifier, optimizer = training(
            lambda p: AdamW(p, lr=1e-2, betas=(0.9, 0.99), **options), torch.float64
        )
        take_steps(model, optimizer, 14)
        assert sparsifier.n_updates == 7
        weight: Tensor = model[0].dense_weight()
        return weight

    plain = {"amsgrad": True} if "amsgrad" in options else {}
    fast = {**options, "fused": True} if plain else options
    torch.testing.assert_close(run(**fast), run(**plain, foreach=False), rtol=1e-9, atol=1e-12)


def test_the_first_update_of_new_weights_is_no_jump() -> None:
    """Late in a training, a second moment without its bias would cause steps of several `lr`."""
    model, sparsifier, optimizer = training(lambda p: AdamW(p, lr=LR, weight_decay=0.0))
    take_steps(model, optimizer, 5)
    for state in optimizer.state.values():
        state["step"].fill_(2000)
    take_steps(model, optimizer, 1)
    assert sparsifier.last_update is not None and sparsifier.last_update.step == 6
    (tracked,) = sparsifier._tracked
    pending = {of: weights.clone() for of, weights in tracked.pending.items()}
    assert pending.keys() == sparsifier.layers.keys()
    take_steps(model, optimizer, 1)
    for of, weights in pending.items():
        values = sparsifier.layers[of].values.detach()
        # 1 / sqrt(1 - beta2) would be a factor of 32, and the mean of a momentum is a tenth.
        assert weights.any() and 0 < values[weights].abs().max() <= 1.01 * LR
    assert not tracked.pending


def test_means_over_rows_and_columns_of_half_blocks() -> None:
    """Adafactor: a grown block's means are those of its first gradient; others are left alone."""
    parameter = nn.Parameter(torch.randn(4, 16, 8))
    optimizer = Adafactor([parameter], lr=LR)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["row_var"].shape == (4, 16, 1) and state["col_var"].shape == (4, 1, 8)
    prepare_reset(optimizer, parameter, torch.tensor([1]))()
    before = copy.deepcopy({key: state[key] for key in ("row_var", "col_var")})
    assert not before["row_var"][1].any() and not before["col_var"][1].any()
    pending = torch.zeros(4, 16, 8, dtype=torch.bool)
    pending[1] = pending[2, 3, 5] = True
    gradient = parameter.grad = torch.randn_like(parameter)
    left = warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
    assert not left.any()
    moment = torch.maximum(gradient[1].square(), gradient[1].square().mean())
    torch.testing.assert_close(state["row_var"][1], moment.mean(1, keepdim=True))
    torch.testing.assert_close(state["col_var"][1], moment.mean(0, keepdim=True))
    others = torch.tensor([0, 2, 3])
    assert all(torch.equal(state[key][others], before[key][others]) for key in before)
