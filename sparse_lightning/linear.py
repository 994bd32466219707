"""`BlockSparseLinear`: a drop-in for `nn.Linear` that stores and computes only present blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning.criteria import block_magnitudes, dense_block_norms
from sparse_lightning.evolution import TopologyUpdate, choose_blocks
from sparse_lightning.kernels import choice, ops
from sparse_lightning.sharding import (
    all_slots,
    at_local_slots,
    is_sharded,
    local_part,
    local_slots,
    whole,
)
from sparse_lightning.topology import BlockTopology, block_grid, count_blocks

# Since PyTorch 2.7. Some versions of Dynamo take it for true wherever they compile.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BlockSparseLinear(nn.Module):
    """y = x W^T + bias, where only some blocks of W are present.

    A new layer has uniformly random blocks; its values are drawn as `nn.Linear` draws them, for
    the inputs that an output really has: uniform within sqrt(1 / (density * in_features)).

    Attributes:
        values: parameter `[capacity, block_size, block_size]`, the blocks by slot; each in W's own
            `[out, in]` orientation. Empty slots hold zeros.
        bias: parameter `[out_features]`, or None.
        topology: `BlockTopology`, which block each slot holds. Part of the state dict.
        block_norms: fp32 `[out_blocks, in_blocks]`, zeros, a leaf of autograd that is neither a
            parameter nor a buffer. While armed, backward sums up in `block_norms.grad` the squared
            Frobenius norm of each block of the dense weight gradient, absent blocks too, of every
            call and micro-batch; whoever reads it sets it to None. It stays as it is in
            `autograd.grad(loss, x)` and `backward(inputs=[x])`, as the gradient of `values` does.
        armed: whether forwards prepare for that; set it by `arm`.
        token_stride: the norms are those of every so many-th token.
        locked: True while an optimizer holds `values`; then a state dict of another capacity is
            refused, since the optimizer's state could not follow.

    Args:
        in_features: size of each input, a multiple of `block_size`.
        out_features: size of each output, a multiple of `block_size`.
        bias: whether to add a bias.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks, in (0, 1].
        topology: the present blocks, instead of `density` (its block size holds then).
        device, dtype: as for `nn.Linear`; dtype fp64, fp32, bf16 or fp16.

    Raises:
        ValueError: for a size, density or dtype that is not offered.

    >>> layer = BlockSparseLinear(1024, 256, block_size=32, density=0.1)
    >>> layer.values.shape, layer(torch.zeros(8, 1024)).shape
    (torch.Size([26, 32, 32]), torch.Size([8, 256]))
    """

    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        density: float | None = None,
        topology: BlockTopology | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (density is None) == (topology is None):
            raise ValueError("Exactly one of `density` and `topology` must be given.")
        if topology is None:
            topology = BlockTopology.random(out_features, in_features, block_size, density)
        _check_fits(topology, out_features, in_features)
        # Its own copy: an update of this layer must not move the blocks of another. Like the
        # tensors below it is built on the CPU, also under `with torch.device("meta")`.
        topology = BlockTopology(topology.coords, topology.grid, topology.block_size)
        dtype = dtype or torch.get_default_dtype()
        check_dtype(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.block_size = topology.block_size
        self.locked = False
        shape = (topology.capacity, self.block_size, self.block_size)
        self.values = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        # Not buffers: averaging callbacks average integer buffers, and DDP's broadcast of buffers
        # would hide a rank whose topology has diverged.
        self.topology = topology
        self.armed = False
        self._armed = torch.zeros((), dtype=torch.bool, device="cpu")
        self.block_norms = _zero_norms(topology.grid, torch.device("cpu"))
        self.token_stride = 1
        self._follow_device()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        density: float | None = None,
        topology: BlockTopology | None = None,
    ) -> BlockSparseLinear:
        """Build the layer from an `nn.Linear`, keeping its weights at the present blocks.

        Args:
            linear: not changed; its device, dtype and `requires_grad` are taken over.
            block_size: 16, 32, 64 or 128.
            density: how many of the blocks to keep: those of largest Frobenius norm.
            topology: which blocks to keep, instead of `density`.
        """
        if (density is None) == (topology is None):
            raise ValueError("Exactly one of `density` and `topology` must be given.")
        weight = linear.weight.detach()
        if topology is None:
            assert density is not None
            grid = block_grid(linear.out_features, linear.in_features, block_size)
            mask = largest_blocks(weight, grid, count_blocks(density, grid[0] * grid[1]))
            topology = BlockTopology.from_mask(mask, block_size)
        layer = cls.__new__(cls)
        # On meta nothing is drawn, so the random state of the user's program stays as it was.
        cls.__init__(
            layer,
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            topology=topology,
            device="meta",
            dtype=weight.dtype,
        )
        layer.values = nn.Parameter(topology.pack(weight), linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        layer._follow_device()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw values and bias anew, as in the class's description."""
        if self.values.device.type == "meta":
            return
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.values.uniform_(-bound, bound).mul_(max(self.density, 1e-12) ** -0.5)
            self.clear_empty_slots()
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def clear_empty_slots(self) -> None:
        """Put zeros where no block is, as every op expects."""
        values = local_part(self.values)
        # fully_shard moves parameters, but not what lies beside them.
        present = self.topology.coords[local_slots(self.values), 0].to(values.device) >= 0
        values.mul_(present.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x` of `[..., in_features]`, any strides."""
        self.check_input(x)
        x = in_autocast_dtype(x)
        y: Tensor = ops.block_linear(x, *self.operands(x))
        return y

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless `x` has the layer's input features."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"The input's last dimension must be in_features={self.in_features}; "
                f"got shape {list(x.shape)}."
            )

    def operands(self, x: Tensor) -> tuple[Tensor | int | None, ...]:
        """Return what the ops take of this layer: values, bias, indices, and for block norms.

        Args:
            x: the input, already `in_autocast_dtype`; only its dtype and device count.

        Raises:
            TypeError: if its dtype is not the layer's, without autocast.
        """
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if _autocast_dtype(x) is not None:
            values = values.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        if x.dtype != values.dtype:
            raise TypeError(
                f"The input must have the layer's dtype {values.dtype}; got {x.dtype}. "
                "Convert one of them, or run under autocast."
            )
        at = self.topology
        return (
            values,
            bias,
            at.coords,
            at.row_offsets,
            at.row_entries,
            at.col_offsets,
            at.col_entries,
            at.slots,
            *self._norms_operands(x),
            self.token_stride,
        )

    def _norms_operands(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the leaf whose gradient is the block norms, and the device's flag; or Nones."""
        if not (self.values.requires_grad and torch.is_grad_enabled()):
            return None, None
        if not torch.compiler.is_dynamo_compiling() and _is_exporting():
            return None, None
        # What is compiled or captured always gets both, so that arming changes nothing in it. The
        # compiler must not come to `armed`, which it would take for a constant and guard.
        if (
            torch.compiler.is_compiling()
            or self.armed
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return self.block_norms, self._armed
        return None, None

    def arm(self, on: bool) -> None:
        """Have backward compute block norms, or no more; what is in `block_norms.grad` stays.

        Nothing is compiled or captured anew. What is compiled, or captured in a CUDA graph,
        computes zeros while the layer is not armed; in eager code nothing is launched then.

        Args:
            on: whether the forwards from now on are followed by backwards that compute them.
        """
        self.armed = on
        self._armed.fill_(on)

    def kernel_choice(self, x: Tensor) -> dict[str, str]:
        """Return what would compute each product of a step with input `x`.

        Args:
            x: `[..., in_features]`, as for `forward`; only shape, dtype and device count.

        Returns:
            By product, "fwd", "dx" and "dw": on CUDA "portable", "hopper" (kernels for compute
            capability 9.0) or "dense" (cuBLAS on a dense copy); on a CPU "by block", "by row" or
            "densify".

        >>> layer = BlockSparseLinear(1024, 256, block_size=32, density=0.1)
        >>> layer.kernel_choice(torch.zeros(512, 1024))
        {'fwd': 'by block', 'dx': 'by block', 'dw': 'by block'}
        """
        tokens = x.numel() // self.in_features
        dtype = _autocast_dtype(x) or x.dtype
        return choice.of_a_step(self.topology, dtype, tokens, x.device)

    def predicted_speedup(self, density: float, dtype: torch.dtype) -> float | None:
        """Return how much faster than a dense layer's a step of this layer should be.

        Args:
            density: present blocks / all blocks.
            dtype: that it computes in.

        Returns:
            dense time / time of forward and backward at 8192 tokens; None for a device on which
            nothing was measured, as a CPU.
        """
        if not self.values.is_cuda:
            return None
        at = self.topology
        device = self.values.get_device()
        return choice.predicted_speedup(dtype, at.block_size, at.grid, density, device)

    @property
    def density(self) -> float:
        """Present blocks / all blocks."""
        return self.topology.density

    def dense_weight(self) -> Tensor:
        """Return W as a new dense tensor `[out_features, in_features]`, without a gradient."""
        return self.topology.unpack(whole(self.values.detach()))

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` of the same function, with zeros at absent blocks."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.dense_weight(), self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def magnitudes(self) -> Tensor:
        """Return the Frobenius norm of each block, fp32 `[out_blocks, in_blocks]`; 0 if absent."""
        magnitudes = all_slots(block_magnitudes(local_part(self.values)), self.values)
        return self.topology.scatter(magnitudes, fill=0.0)

    def apply_update(self, update: TopologyUpdate) -> None:
        """Make a topology update real: changed slots become zero, in value and in gradient."""
        self.prepare_update(update)()

    def prepare_update(self, update: TopologyUpdate) -> Callable[[], None]:
        """Return what `apply_update` does, as a function that only writes in place.

        So an update of many layers can be all or nothing: what takes memory is done here.
        """
        changed = at_local_slots(update.changed, self.values)
        write_topology = self.topology.prepare(update.coords)

        @torch.no_grad()
        def write() -> None:
            for tensor in (self.values, self.values.grad):
                if tensor is not None:
                    local_part(tensor).index_fill_(0, changed, 0)
            write_topology()

        return write

    def shrink(self, capacity: int) -> Tensor:
        """Give up empty slots, so that their memory is free; the blocks stay.

        The parameter object stays and takes another shape: what an optimizer keeps for it has to
        follow (`optimizer_state.keep_slots`). `topology` becomes another object. Call it between
        steps, as the backward of an earlier forward would bring a gradient of the old shape.

        Args:
            capacity: slots to have, at least the present blocks.

        Returns:
            int64 `[capacity]`, ascending: which slots were kept, at their new places.

        Raises:
            ValueError: if there are more blocks, or fewer slots.
            RuntimeError: if `values` is sharded.
        """
        kept, write = self.prepare_shrink(capacity)
        write()
        return kept

    @torch.no_grad()
    def prepare_shrink(self, capacity: int) -> tuple[Tensor, Callable[[], None]]:
        """Return what `shrink` returns, and what it does as a function that cannot fail."""
        at = self.topology
        if not at.n_blocks <= capacity <= at.capacity:
            raise ValueError(
                f"`capacity` must be in {at.n_blocks}..{at.capacity}, from the present blocks to "
                f"the present slots; got {capacity}."
            )
        if is_sharded(self.values):
            raise RuntimeError(
                "`values` must be whole when a layer shrinks, as fully_shard holds it in the shape "
                "that it had; got a DTensor. Shrink before fully_shard, or keep the capacity."
            )
        present = at.coords[:, 0] >= 0
        kept = (~present).int().argsort(stable=True)[:capacity].sort().values
        topology = BlockTopology(at.coords[kept], at.grid, at.block_size)
        values = self.values
        data = values.detach()[kept]
        grad = None if values.grad is None else values.grad[kept]
        # A graph that is still held remembers the old shape for the gradient of this parameter, and
        # autograd would refuse the next one. It forgets when the dtype changes.
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        nothing = data.new_empty(0, dtype=other)

        def write() -> None:
            self.topology = topology
            values.grad = None
            values.data = nothing
            values.data = data
            values.grad = grad

        return kept, write

    def __getstate__(self) -> dict[str, Any]:
        # A copy is no part of the training: nothing follows its blocks, and nobody reads its norms.
        norms = _zero_norms(self.topology.grid, self.block_norms.device)
        unarmed = {"locked": False, "armed": False, "block_norms": norms}
        return {**self.__dict__, **unarmed, "_armed": torch.zeros_like(self._armed)}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"blocks={self.topology.n_blocks}/{self.topology.grid[0] * self.topology.grid[1]}"
        )

    def _follow_device(self) -> None:
        """Bring what is not a parameter to the device of `values`; on meta it stays where it is."""
        device = self.values.device
        if device.type != "meta":
            self.topology.to_(device)
            self._armed = self._armed.to(device)
            if self.block_norms.device != device:
                self.block_norms = _zero_norms(self.topology.grid, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        # The function itself must not see the indices: `.double()` would make them floats, and
        # `.to_empty()` would leave them undefined.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the topology, for the state dict; int32, of a length fixed by the capacity."""
        return self.topology.to_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Accept what `_load_from_state_dict` has already put in place."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self._load_topology(state_dict, prefix)
        except (ValueError, RuntimeError) as error:
            # Always raised by `load_state_dict`, also with strict=False.
            error_msgs.append(f"{error} (layer '{prefix.rstrip('.')}')")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_topology(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the topology and the capacity of a state dict, before its values are copied."""
        state = state_dict.get(prefix + "_extra_state")
        values = state_dict.get(prefix + "values")
        weight = state_dict.pop(prefix + "weight", None) if values is None else None
        if state is not None and not isinstance(state, Tensor):
            # PyTorch's stand-in, where a loader passes parameters one by one.
            raise ValueError(
                "The topology must be loaded with the `values` that it places; got "
                f"{type(state).__name__}. Lightning loads a checkpoint of one file into a sharded "
                "model without it: resume from a distributed checkpoint, or load before "
                "fully_shard."
            )
        if state is not None and values is None and weight is None:
            raise ValueError(
                "The topology must come with the `values` that it places; got none. "
                "Save with state_dict(), and keep every key of it."
            )
        if state is not None:
            topology = BlockTopology.from_state(state)
            _check_fits(topology, self.out_features, self.in_features)
        elif values is not None:
            raise ValueError(
                "`values` must come with the topology they belong to; got no '_extra_state'. "
                "Save with state_dict(), and keep every key of it."
            )
        else:
            topology = self.topology
        if weight is not None:
            # A dense checkpoint can start a sparse run.
            values = state_dict[prefix + "values"] = topology.pack(weight)
            state_dict.setdefault(prefix + "_extra_state", topology.to_state())
        expected = (topology.capacity, topology.block_size, topology.block_size)
        if values is not None and values.shape != expected:
            raise ValueError(
                f"`values` must have shape {list(expected)} by the saved topology; "
                f"got {list(values.shape)}. The checkpoint is damaged."
            )
        if state is not None:
            self._adopt(topology)

    def _adopt(self, topology: BlockTopology) -> None:
        same_slots = (topology.capacity, topology.block_size) == (
            self.topology.capacity,
            self.topology.block_size,
        )
        if same_slots:
            self.topology.assign_(topology.coords.to(self.topology.device))
            return
        if self.locked:
            raise RuntimeError(
                f"A layer in training must keep its capacity {self.topology.capacity} and block "
                f"size {self.block_size}; the state dict has {topology.capacity} and "
                f"{topology.block_size}. Load it before the optimizer is built."
            )
        self.topology, self.block_size = topology, topology.block_size
        self.block_norms = _zero_norms(topology.grid, self.block_norms.device)
        # The parameter object stays, so that ties and optimizers yet without state still hold it.
        shape = (topology.capacity, topology.block_size, topology.block_size)
        self.values.data = self.values.data.new_zeros(shape)
        self.values.grad = None
        self._follow_device()


def largest_blocks(weight: Tensor, grid: tuple[int, int], n_blocks: int) -> Tensor:
    """Return the mask of the blocks of largest Frobenius norm of a dense weight, on the CPU.

    Args:
        weight: `[out_features, in_features]`.
        grid: (out_blocks, in_blocks).
        n_blocks: how many.
    """
    # Blocks with a NaN come last, but they are chosen where nothing else is left.
    norms = dense_block_norms(weight, grid).cpu().nan_to_num(-1.0, -1.0, -1.0)
    return choose_blocks(norms, torch.ones_like(norms, dtype=torch.bool), n_blocks)


def _zero_norms(grid: tuple[int, int], device: torch.device) -> Tensor:
    return torch.zeros(grid, dtype=torch.float32, device=device, requires_grad=True)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Return `x` in the dtype that autocast wants for a product."""
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast wants for a product of `x`; None if it wants none."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the ops offer the dtype."""
    if dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"`dtype` must be one of {names}; got {dtype}. Convert the layer first.")


def _check_fits(topology: BlockTopology, out_features: int, in_features: int) -> None:
    if (topology.out_features, topology.in_features) != (out_features, in_features):
        raise ValueError(
            f"`topology` must be for a weight [{out_features}, {in_features}]; "
            f"got one for [{topology.out_features}, {topology.in_features}]."
        )
