"""`BlockSparseLinear`: a drop-in for `nn.Linear` that stores and computes only present blocks."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparse_lightning.interrupts import deferred_signals
from sparse_lightning.kernels import choice, ops
from sparse_lightning.kernels.operands import LayerOperands
from sparse_lightning.nm_pattern import check_nm
from sparse_lightning.policy.criteria import block_magnitudes, dense_block_norms
from sparse_lightning.policy.updates import TopologyUpdate, difference, first_blocks
from sparse_lightning.sharding import (
    gather_slots,
    gather_whole,
    is_sharded,
    local_part,
    local_slots,
    prepare_slot_change,
)
from sparse_lightning.topology import BlockTopology, block_grid, count_blocks

# Attributes of a layer other than its parameters and sizes.
_ATTRIBUTES = (
    "topology",
    "block_size",
    "armed",
    "_armed_flag",
    "block_norms",
    "token_stride",
    "_is_locked",
    "_topology_before_load",
    "_label",
    "_lineage",
    "_has_trained",
    "_dense_class",
)

# All live layers of the process; the copies of a layer are searched for among these.
LIVE_LAYERS: WeakSet[BlockSparseLinear] = WeakSet()

# Available since PyTorch 2.7. Some versions of Dynamo evaluate it to True in any compilation.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Called with the old and the new shape of a parameter whose data is replaced.
reshape_hooks: list[Callable[[torch.Size, torch.Size], None]] = []


# Dynamo, which the exporter uses as a fallback, would otherwise evaluate the call to False.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


class BlockSparseLinear(nn.Module):
    """y = x W^T + bias, where only some blocks of W are present.

    The blocks of a new layer are uniformly random. Its values are initialized as those of
    `nn.Linear`, scaled to the average number of inputs per output: uniform within
    +-sqrt(1 / (weight_density * in_features)).

    With `nm="2:4"`, present blocks keep two of each four neighbouring weights of a row, at first
    random ones.

    Attributes:
        values: parameter `[capacity, block_size, block_size]`, the blocks by slot, each in the
            `[out, in]` orientation of W; `[capacity, block_size, block_size / 2]` with `nm="2:4"`,
            as `sparse_lightning.nm_pattern` describes. Empty slots hold zeros.
        bias: parameter `[out_features]`, or None.
        topology: `BlockTopology`, the block in each slot. It is part of the state dict.
        block_norms: fp32 `[out_blocks, in_blocks]` of zeros, an autograd leaf that is neither a
            parameter nor a buffer. While the layer is armed, each backward adds to
            `block_norms.grad` the squared Frobenius norm of each block of the dense weight
            gradient, including absent blocks. The reader resets `grad` to None. Like the gradient
            of `values`, it is not changed by `autograd.grad(loss, x)` or `backward(inputs=[x])`.
        armed: whether backward passes compute block norms; set by `arm`.
        token_stride: only every `token_stride`-th token contributes to the norms.

    Args:
        in_features: size of each input, a multiple of `block_size`.
        out_features: size of each output, a multiple of `block_size`.
        bias: whether to add a bias.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks, in (0, 1].
        nm: "2:4" to keep two of each four weights within blocks; None to keep all.
        topology: the present blocks, instead of `density`; its block size overrides `block_size`,
            and its pattern `nm`.
        device, dtype: as for `nn.Linear`; the dtype is fp64, fp32, bf16 or fp16.

    Raises:
        ValueError: if a size, the density or the dtype is not supported.

    >>> layer = BlockSparseLinear(1024, 256, block_size=32, density=0.1)
    >>> layer.values.shape, layer(torch.zeros(8, 1024)).shape
    (torch.Size([26, 32, 32]), torch.Size([8, 256]))
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    topology: BlockTopology
    block_size: int
    block_norms: Tensor
    armed: bool
    _armed_flag: Tensor
    token_stride: int

    # True while an optimizer holds `values`. State dicts of another capacity are then refused,
    # because the optimizer state would not fit.
    _is_locked: bool
    # The topology before a state dict with other blocks was loaded while an optimizer holds
    # `values`, whose state then still belongs to it, on the CPU; None if there is nothing to adapt.
    _topology_before_load: BlockTopology | None
    # Name of the layer in the model in which it was swapped, for messages.
    _label: str
    # Identifier shared with copies, and with layers whose weights were equal at the swap.
    _lineage: str
    # Whether the layer has been trained since the swap; it then no longer counts as a copy.
    _has_trained: bool
    # Class that `make_dense_` restores: `nn.Linear`, or a class whose weight is stored transposed,
    # `[in_features, out_features]`, such as Transformers' `Conv1D`.
    _dense_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        density: float | None = None,
        nm: str | None = None,
        topology: BlockTopology | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (density is None) == (topology is None):
            raise ValueError("Exactly one of `density` and `topology` must be given.")
        if topology is None:
            topology = BlockTopology.random(out_features, in_features, block_size, density, nm=nm)
        elif check_nm(nm) not in (None, topology.nm):
            raise ValueError(
                f"`nm` must be that of `topology`, {topology.nm!r}, or be left out; got {nm!r}. "
                "`topology.with_random_positions(nm)` has the pattern."
            )
        _check_fits(topology, out_features, in_features)
        dtype = dtype or torch.get_default_dtype()
        check_dtype(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.values = nn.Parameter(torch.empty(topology.values_shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        vars(self).update(_new_attributes(topology, self.values.device))
        LIVE_LAYERS.add(self)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_size: int = 64,
        density: float | None = None,
        nm: str | None = None,
        topology: BlockTopology | None = None,
    ) -> BlockSparseLinear:
        """Build the layer from a dense one, keeping the weights of the present blocks.

        Args:
            linear: an `nn.Linear` or Transformers' `Conv1D`; not changed. The new layer has its
                device, dtype and `requires_grad`.
            block_size: 16, 32, 64 or 128.
            density: share of blocks to keep; those of largest Frobenius norm are kept, even where
                that leaves a block row or column without any, unlike in `sparsify`.
            nm: "2:4" to keep the two largest of each four weights within blocks; None to keep all.
            topology: the blocks and weights to keep, instead of `density` and `nm`.
        """
        if (density is None) == (topology is None):
            raise ValueError("Exactly one of `density` and `topology` must be given.")
        if topology is not None and nm is not None:
            raise ValueError("`nm` must be left out with `topology`, which has its own; got both.")
        parameter, bias = cast(nn.Parameter, linear.weight), cast(Tensor | None, linear.bias)
        weight, (out_features, in_features) = dense_weight_of(linear), dense_shape(linear)
        if topology is None:
            assert density is not None
            grid = block_grid(out_features, in_features, block_size)
            mask = largest_blocks(weight, grid, count_blocks(density, grid[0] * grid[1]))
            topology = BlockTopology.from_mask(mask, block_size).with_largest_positions(nm, weight)
        layer = cls.__new__(cls)
        # On meta nothing is drawn, so the random number generator keeps its state.
        cls.__init__(
            layer,
            in_features,
            out_features,
            bias is not None,
            topology=topology,
            device="meta",
            dtype=weight.dtype,
        )
        layer.values = nn.Parameter(topology.pack(weight), parameter.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        if is_conv1d(linear):
            layer._dense_class = type(linear)
            layer.nx, layer.nf = in_features, out_features  # read by the restored `Conv1D`
        layer._move_attributes()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialize values and bias as the class docstring describes."""
        if self.values.device.type == "meta":
            return
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.values.uniform_(-bound, bound).mul_(max(self.weight_density, 1e-12) ** -0.5)
            self._zero_empty_slots()
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x` of `[..., in_features]` with any strides."""
        self._check_input(x)
        x = in_autocast_dtype(x)
        y: Tensor = ops.block_linear(x, *self._operands(x))
        return y

    def _check_input(self, x: Tensor) -> None:
        """Raise ValueError unless the last dimension of `x` is `in_features`.

        Raises:
            RuntimeError: during `torch.onnx.export`, because ONNX has no block-sparse layers.
        """
        self._check_no_onnx_export()
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"The input's last dimension must be in_features={self.in_features}; "
                f"got shape {list(x.shape)}."
            )

    def _check_no_onnx_export(self) -> None:
        # Checked only while tracing or exporting: `is_in_onnx_export` imports the exporter.
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if (is_tracing or _is_exporting()) and _is_in_onnx_export():
            raise RuntimeError(
                "`torch.onnx.export` and `to_onnx` must be given a dense model, as ONNX has no "
                f"block-sparse layers; got a BlockSparseLinear{self._message_suffix()}. Use "
                "`sparse-lightning export --to onnx` or `sparse_lightning.export.write_onnx`, "
                "which make it dense first."
            )

    def _message_suffix(self) -> str:
        """Return the end of a message about this layer, with its name if it is known."""
        label = self.__dict__.get("_label", "")
        return f" (layer '{label}')" if label else ""

    def _operands(self, x: Tensor) -> LayerOperands:
        """Return this layer's operands for the ops.

        Args:
            x: the input, already `in_autocast_dtype`; only its dtype and device are used.

        Raises:
            TypeError: if the dtype of `x` is not that of the layer and autocast is off.
        """
        values = cast(Tensor, self._parameter("values"))
        bias = self._parameter("bias")
        norms = armed = None
        if values.requires_grad and torch.is_grad_enabled():
            norms, armed = self._norm_operands(x)
        if x.dtype != values.dtype or (bias is not None and x.dtype != bias.dtype):
            if _autocast_dtype(x) is not None:
                values = values.to(x.dtype)
                bias = None if bias is None else bias.to(x.dtype)
            elif x.dtype != values.dtype:
                raise TypeError(
                    f"The input must have the layer's dtype {values.dtype}; got {x.dtype}. "
                    "Convert one of them, or run under autocast."
                )
        topology = self.topology
        return LayerOperands(  # faster than unpacking `topology.indices`
            values,
            bias,
            topology.coords,
            topology.row_offsets,
            topology.row_entries,
            topology.col_offsets,
            topology.col_entries,
            topology.slots,
            topology.positions,
            norms,
            armed,
            self.token_stride,
        )

    def _parameter(self, name: str) -> Tensor | None:
        """Return a parameter from the dict, half a microsecond faster than an attribute."""
        own = self._parameters
        if name in own:
            return own[name]
        # A parametrization, or a wrapper of the model, holds it elsewhere.
        return cast(Tensor | None, getattr(self, name))

    def _norm_operands(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return `block_norms` and the flag on the device, for a forward pass with a backward.

        They are (None, None) if no norms are needed.
        """
        if not torch.compiler.is_dynamo_compiling() and _is_exporting():
            return None, None
        # Compiled or captured code always receives both, so arming does not change it. The
        # condition is ordered so that Dynamo never reads `armed`, which it would guard on.
        if (
            torch.compiler.is_compiling()
            or self.armed
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return self.block_norms, self._armed_flag
        return None, None

    def arm(self, on: bool) -> None:
        """Enable or disable block norms; `block_norms.grad` is kept.

        Arming causes neither recompilation nor recapture. While the layer is not armed, compiled
        code and CUDA graphs compute zeros, and eager code launches nothing.

        Args:
            on: whether the backward passes of later forward passes compute block norms.
        """
        self.armed = on
        self._armed_flag.fill_(on)

    def kernel_choice(self, x: Tensor) -> dict[str, str]:
        """Return the kernel kind that computes each product of a step with input `x`.

        Args:
            x: `[..., in_features]`, as for `forward`; only its shape, dtype and device are used.

        Returns:
            The kind for each of "fwd", "dx" and "dw": on CUDA "portable", "hopper" (kernels for
            compute capability 9.0) or "dense" (cuBLAS on a dense copy); on a CPU "by block",
            "batched" or "densify".

        >>> layer = BlockSparseLinear(1024, 256, block_size=32, density=0.1)
        >>> layer.kernel_choice(torch.zeros(512, 1024))
        {'fwd': 'by block', 'dx': 'by block', 'dw': 'by block'}
        """
        tokens = x.numel() // self.in_features
        dtype = _autocast_dtype(x) or x.dtype
        return choice.choose_for_step(self.topology, dtype, tokens, x.device)

    def predicted_speedup(self, density: float, dtype: torch.dtype) -> float | None:
        """Return the predicted speed-up of a step of this layer over that of a dense layer.

        Args:
            density: present blocks / all blocks.
            dtype: dtype of the computation.

        Returns:
            dense time / time of forward and backward at 8192 tokens; None for a device without
            measurements, such as a CPU.
        """
        if not self.values.is_cuda:
            return None
        device = self.values.get_device()
        return choice.step_speedup(dtype, self.block_size, self.topology.grid, density, device)

    @property
    def density(self) -> float:
        """Present blocks / all blocks."""
        return self.topology.density

    @property
    def nm(self) -> str | None:
        """The pattern within blocks, "2:4"; None if blocks are whole."""
        return self.topology.nm

    @property
    def weight_density(self) -> float:
        """Kept weights / all weights; half of `density` with `nm="2:4"`."""
        return self.topology.weight_density

    def dense_weight(self) -> Tensor:
        """Return W as a new dense tensor `[out_features, in_features]`, detached."""
        return self.topology.unpack(gather_whole(self.values.detach()))

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` that computes the same, with zeros at absent blocks."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.dense_weight(), self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def magnitudes(self) -> Tensor:
        """Return the Frobenius norm of each block, fp32 `[out_blocks, in_blocks]`; 0 if absent."""
        magnitudes = gather_slots(block_magnitudes(local_part(self.values)), self.values)
        return self.topology.scatter(magnitudes, fill=0.0)

    @torch.no_grad()
    def _zero_empty_slots(self) -> None:
        """Set the values of empty slots to zero, as every op expects."""
        values = local_part(self.values)
        # fully_shard moves parameters to the device, but not the topology.
        present = self.topology.coords[local_slots(self.values), 0].to(values.device) >= 0
        values.mul_(present.view(-1, 1, 1))

    def _agrees_with(self, other: BlockSparseLinear) -> bool:
        """Return whether both layers have common blocks and equal weights in all of them."""
        mine, theirs = self.dense_weight(), other.dense_weight().to(self.values)
        if mine.shape != theirs.shape:
            return False
        common = (mine != 0) & (theirs != 0)
        return bool(common.any()) and torch.equal(mine[common], theirs[common])

    @torch.no_grad()
    def _adopt_blocks_of(self, source: BlockSparseLinear) -> None:
        """Adopt the topology of a layer of the same sizes, slot by slot.

        Blocks that both layers have keep their weights; the weights of the others are copied from
        the source. If `values` is sharded, every rank must call this.
        """
        mine, theirs = self.topology, source.topology
        if mine.equals(theirs):
            return
        values = gather_whole(source.values.detach())
        if mine.block_size == theirs.block_size:
            own_values, device = gather_whole(self.values.detach()), values.device
            present = theirs.coords[:, 0] >= 0
            rows, cols = theirs.coords.long().clamp_min(0).unbind(1)
            slots = mine.slots.to(theirs.device)[rows, cols].long()
            slots = slots.masked_fill(~present, -1).to(device)
            is_own = (slots >= 0).view(-1, 1, 1)
            own = mine.expand(own_values.to(values))[slots.clamp_min(0)]
            if mine.positions is not None:
                kept = mine.expand(torch.ones_like(own_values, dtype=torch.bool, device=device))
                is_own = is_own & theirs.compress(kept[slots.clamp_min(0)])
            values = torch.where(is_own, theirs.compress(own), values)
        with deferred_signals():
            self._set_topology(theirs)
            local_part(self.values).copy_(values[local_slots(self.values)])

    def apply_update(self, update: TopologyUpdate) -> None:
        """Apply a topology update: changed weights become zero, in value and in gradient."""
        write = self._prepare_update(update)
        with deferred_signals():
            write()

    def _prepare_update(self, update: TopologyUpdate) -> Callable[[], None]:
        """Return a function that applies a topology update and only writes in place.

        All allocation happens here, so that an update of many layers can be all or nothing.
        """
        writes = [
            prepare_slot_change(tensor.detach(), update.changed, update.moves)
            for tensor in (self.values, self.values.grad)
            if tensor is not None
        ]
        writes.append(self.topology._prepare_assign(update.coords, update.positions))

        def write_all() -> None:
            for write in writes:
                write()

        return write_all

    def shrink(self, capacity: int) -> Tensor:
        """Remove empty slots to free their memory; the blocks stay.

        The parameter object stays and its shape changes, so the caller must adapt the optimizer
        state of the parameter (`optimizer_state.prepare_slot_removal`). `topology` becomes a new
        object. Call this between steps: the backward of an earlier forward would produce a
        gradient of the old shape.

        Args:
            capacity: new number of slots, at least the number of present blocks.

        Returns:
            int64 `[capacity]`, ascending: the old indices of the slots that were kept.

        Raises:
            ValueError: if `capacity` is below the number of blocks or above the number of slots.
            RuntimeError: if `values` is sharded or in shared memory.
        """
        kept, write = self._prepare_shrink(capacity)
        with deferred_signals():
            write()
        return kept

    @torch.no_grad()
    def _prepare_shrink(self, capacity: int) -> tuple[Tensor, Callable[[], None]]:
        """Return the slots that `shrink` keeps, and a function that shrinks and cannot fail."""
        old = self.topology
        if not old.n_blocks <= capacity <= old.capacity:
            raise ValueError(
                f"`capacity` must be in {old.n_blocks}..{old.capacity}, from the number of present "
                f"blocks to the number of slots; got {capacity}."
            )
        if self.is_shared:
            raise RuntimeError(
                "A layer must not be in shared memory when it shrinks, as other processes would "
                f"keep its old values; got one after `share_memory()`{self._message_suffix()}. "
                "Shrink it before sharing, or keep the capacity."
            )
        if is_sharded(self.values):
            raise RuntimeError(
                "`values` must not be sharded when a layer shrinks, as fully_shard fixes its "
                "shape; got a DTensor. Shrink before fully_shard, or keep the capacity."
            )
        present = old.coords[:, 0] >= 0
        kept = (~present).int().argsort(stable=True)[:capacity].sort().values
        topology = old.select(kept)
        values = self.values
        data = values.detach()[kept]
        grad = None if values.grad is None else values.grad[kept]
        write_data = _prepare_data(values, data)

        def write() -> None:
            self.topology = topology
            write_data()
            values.grad = grad

        return kept, write

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not take part in the training, so its flags are reset. The tensors that only
        # training uses are left out and recreated: a spawned process needs all tensors of the
        # state to be alive when it unpickles them.
        state = {**self.__dict__, "armed": False, "_is_locked": False, "_has_trained": False}
        state["_topology_before_load"] = None
        return {k: v for k, v in state.items() if k not in ("block_norms", "_armed_flag")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        device = self.topology.device
        self._armed_flag = torch.zeros((), dtype=torch.bool, device=device)
        self.block_norms = _zero_norms(self.topology.grid, device)
        LIVE_LAYERS.add(self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"blocks={self.topology.n_blocks}/{self.topology.grid[0] * self.topology.grid[1]}"
            + ("" if self.nm is None else f", nm={self.nm!r}")
        )

    def _move_attributes(self) -> None:
        """Move the topology and the norms to the device of `values`, unless that is meta."""
        device = self.values.device
        if device.type != "meta":
            self.topology.to_(device)
            self._armed_flag = self._armed_flag.to(device)
            if self.block_norms.device != device:
                self.block_norms = _zero_norms(self.topology.grid, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        example = self._example_of(fn)
        # `fn` is not applied to the indices: `.double()` would make them floats, and `.to_empty()`
        # would leave them uninitialized.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move_attributes()
        # After `share_memory()`, processes that share the values need the topology as well.
        is_shared = example.device.type == "cpu" and example.is_shared()
        if is_shared:
            self.topology.share_memory_()
        elif self.is_shared and not self.values.is_shared():
            # A conversion of the dtype has moved the values out of shared memory.
            self.topology = self.topology.clone()
        return self

    @property
    def is_shared(self) -> bool:
        """Whether the topology is in shared memory, after `share_memory()`."""
        return self.topology.is_shared

    @property
    def _is_transposed(self) -> bool:
        """Whether the dense weight is stored as `[in_features, out_features]`."""
        return self._dense_class is not nn.Linear

    def _example_of(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the result of `fn` for a tensor like `values`, without changing a parameter.

        Raises:
            TypeError: if the dtype of the result is not supported. Preceding layers of the model
                have been converted by then.
        """
        values = self.values
        example = fn(torch.empty(1, dtype=values.dtype, device=values.device))
        if example.dtype not in _DTYPES:
            raise TypeError(
                f"The dtype of a block-sparse layer must be one of {_names_of(_DTYPES)}; got "
                f"{example.dtype}{self._message_suffix()}. Call `densify(model)` first, or leave "
                "the layer dense by `exclude`."
            )
        return example

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The metadata of PyTorch's state dicts identifies copies after loading.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["lineage"], metadata["label"] = self._lineage, self._label
            metadata["has_learnt"] = self._has_trained

    def get_extra_state(self) -> Tensor:
        """Return the topology for the state dict, int32; the capacity determines its length."""
        return self.topology.to_state(self._is_transposed)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the topology from a state; its values are loaded before or after this call."""
        topology = BlockTopology.from_state(state)
        _check_fits(topology, self.out_features, self.in_features)
        shape = topology.values_shape
        if self.values.shape == shape and shape != self.topology.values_shape:
            # A loader has already replaced `values`, without calling `_load_from_state_dict`.
            self.topology = topology
            self._move_attributes()
        else:
            self._set_topology(topology)

    # A block-sparse layer has no dense weight to read, and a weight assigned to it would be
    # ignored. Accessing `weight`, for example to tie it, raises an error that names the layer.

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self._refuse_weight()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._refuse_weight()
        super().__setattr__(name, value)

    def _refuse_weight(self) -> NoReturn:
        pattern = self.__dict__.get("_label") or "<its name>"
        raise AttributeError(
            f"A block-sparse layer has no `weight`, only the present blocks, `values`"
            f"{self._message_suffix()}. `dense_weight()` computes the weight for reading. If the "
            f"model reads or ties the weight, leave the layer dense: exclude=[{pattern!r}]."
        )

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
            # `load_state_dict` raises these errors even with strict=False.
            error_msgs.append(f"{error} (layer '{prefix.rstrip('.')}')")
            return
        if "lineage" in local_metadata:
            self._lineage = local_metadata["lineage"]
            # A layer that loads the trained weights of another layer becomes its copy.
            is_own = local_metadata.get("label") == self._label
            self._has_trained = is_own and bool(local_metadata.get("has_learnt"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_topology(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Set the topology and capacity from a state dict before its values are copied."""
        state = state_dict.get(prefix + "_extra_state")
        if isinstance(state, Tensor) and state.is_floating_point():
            # The state dict is a mean of several with equal topologies, such as those of a network
            # and its target network.
            rounded, own = state.round().int(), self.get_extra_state()
            if rounded.shape == own.shape and torch.equal(rounded.to(own.device), own):
                state = state_dict[prefix + "_extra_state"] = own
            else:
                raise ValueError(
                    "The topologies of averaged state dicts must be equal, and be this layer's; "
                    "got a mean of others. Average weights whose blocks no longer change, or let "
                    "AveragedModel or Lightning's callbacks average, whose copies follow updates."
                )
        values = state_dict.get(prefix + "values")
        weight = state_dict.pop(prefix + "weight", None) if values is None else None
        if weight is not None and weight.dim() == 3:
            # The files of Transformers' `save_pretrained` store the blocks as `weight`.
            values, weight = weight, None
            state_dict[prefix + "values"] = values
        if state is not None and not isinstance(state, Tensor):
            # A loader that passes parameters one by one replaces the state by a placeholder.
            raise ValueError(
                "The topology must be loaded together with its `values`; got "
                f"{type(state).__name__}. Lightning loads a single-file checkpoint into a sharded "
                "model without the topology: resume from a distributed checkpoint, or load before "
                "fully_shard."
            )
        if state is not None and values is None and weight is None:
            raise ValueError(
                "The topology must come with its `values`; got none. "
                "Save with state_dict(), and keep every key of it."
            )
        if state is not None:
            topology = BlockTopology.from_state(state)
            _check_fits(topology, self.out_features, self.in_features)
        elif values is not None:
            raise ValueError(
                "`values` must come with their topology; got no '_extra_state'. "
                "Save with state_dict(), and keep every key of it."
            )
        else:
            topology = self.topology
        if weight is not None:
            # Dense checkpoints can be loaded: the weights of the present blocks are kept.
            weight = weight.T if self._is_transposed else weight
            values = state_dict[prefix + "values"] = topology.pack(weight)
            state_dict.setdefault(prefix + "_extra_state", topology.to_state())
        expected = topology.values_shape
        if values is not None and values.shape != expected:
            raise ValueError(
                f"`values` must have shape {list(expected)} to match the saved topology; "
                f"got {list(values.shape)}. The checkpoint is damaged."
            )
        if state is not None:
            self._set_topology(topology)

    def _set_topology(self, topology: BlockTopology) -> None:
        """Set the topology; `values` becomes zero if its shape changes."""
        old = self.topology
        if topology.values_shape == old.values_shape:
            if not old.equals(topology):
                before = old.clone().to_(torch.device("cpu"))
                update = difference(before, topology)
                writes = [old._prepare_assign(topology.coords, topology.positions)]
                if self.values.grad is not None:  # of the weights that are replaced
                    grad = self.values.grad
                    writes.append(prepare_slot_change(grad, update.changed, update.moves))
                with deferred_signals():
                    if self._is_locked and self._topology_before_load is None:
                        self._topology_before_load = before
                    for write in writes:
                        write()
            return
        if self._is_locked:
            raise RuntimeError(
                f"A layer in training must keep its capacity {old.capacity}, block size "
                f"{self.block_size} and pattern nm={old.nm!r}; the state dict has "
                f"{topology.capacity}, {topology.block_size} and {topology.nm!r}. Load it before "
                "the optimizer is built; a training whose capacity is to be rolled back while it "
                "runs needs shrink=False."
            )
        self._topology_before_load = None
        self.topology = topology.clone()
        self.block_size = topology.block_size
        self.block_norms = _zero_norms(topology.grid, self.block_norms.device)
        # The parameter object stays, so tied modules and optimizers without state still hold it.
        _set_data(self.values, self.values.detach().new_zeros(topology.values_shape))
        self._move_attributes()


@torch.no_grad()
def make_sparse_(
    linear: nn.Module, topology: BlockTopology, scale: float = 1.0, label: str = ""
) -> BlockSparseLinear:
    """Turn an `nn.Linear` into a `BlockSparseLinear` in place.

    The module object stays, and the weight's Parameter becomes `values` with other data. All
    references to either remain valid: lists of layers, hooks, attributes and optimizers.

    Args:
        linear: an `nn.Linear` or Transformers' `Conv1D`.
        topology: the blocks to keep.
        scale: factor for the kept weights.
        label: name of the layer, for messages.
    """
    dense_class = type(linear)
    weight = cast(nn.Parameter, linear.weight)
    transposed = is_conv1d(linear)
    # Everything that may run out of memory precedes the first change.
    attributes = _new_attributes(topology, weight.device)
    write_data = _prepare_data(weight, topology.pack(dense_weight_of(linear)).mul_(scale))
    with deferred_signals():
        _rename_parameter(linear, "weight", "values")
        write_data()
        linear.__class__ = BlockSparseLinear
        layer = cast(BlockSparseLinear, linear)
        layer.out_features, layer.in_features = topology.out_features, topology.in_features
        if transposed:
            layer._dense_class = dense_class
        vars(layer).update(attributes, _label=label)
        LIVE_LAYERS.add(layer)
    return layer


@torch.no_grad()
def make_dense_(layer: BlockSparseLinear) -> nn.Module:
    """Undo `make_sparse_`: restore the class, and turn `values` into the dense weight.

    Raises:
        RuntimeError: if a `Sparsifier` that is attached to an optimizer evolves the layer.
    """
    check_may_become_dense(layer)
    weight = layer.dense_weight()
    weight = weight.T.contiguous() if layer._is_transposed else weight
    write_data, dense_class = _prepare_data(layer.values, weight), layer._dense_class
    sizes = ("in_features", "out_features") if layer._is_transposed else ()
    with deferred_signals():
        LIVE_LAYERS.discard(layer)
        for name in (*_ATTRIBUTES, *sizes):
            vars(layer).pop(name, None)
        _rename_parameter(layer, "values", "weight")
        layer.__class__ = dense_class  # type: ignore[assignment]
        write_data()
    return layer


def check_may_become_dense(layer: BlockSparseLinear) -> None:
    """Raise RuntimeError if an attached `Sparsifier` evolves the layer."""
    if layer._is_locked:
        raise RuntimeError(
            "A layer must not be evolved by a Sparsifier when it becomes dense; got one that is "
            f"attached to an optimizer{layer._message_suffix()}. Call `detach()` first, or densify "
            "a copy."
        )


def _new_attributes(topology: BlockTopology, device: torch.device) -> dict[str, Any]:
    """Return the attributes of a new layer, other than its parameters and sizes.

    Args:
        topology: the topology, which is copied, because an update must not change another layer.
        device: device of `values`.
    """
    # The tensors are on the CPU even under `with torch.device("meta")`. None of them is a buffer:
    # averaging callbacks average integer buffers, and DDP's broadcast of buffers would hide a rank
    # whose topology has diverged.
    device = torch.device("cpu") if device.type == "meta" else device
    topology = topology.clone().to_(device)
    return {
        "topology": topology,
        "block_size": topology.block_size,
        "armed": False,
        "_armed_flag": torch.zeros((), dtype=torch.bool, device=device),
        "block_norms": _zero_norms(topology.grid, device),
        "token_stride": 1,
        "_is_locked": False,
        "_topology_before_load": None,
        "_label": "",
        "_lineage": uuid.uuid4().hex,
        "_has_trained": False,
    }


def _rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Rename a parameter, keeping the order of parameters."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({new if n == old else n: p for n, p in parameters.items()})


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Replace the data of a parameter, whose shape may change, and clear its gradient."""
    _prepare_data(parameter, data)()


def _prepare_data(parameter: nn.Parameter, data: Tensor) -> Callable[[], None]:
    """Return a function that does what `_set_data` does, without allocating tensors."""
    # While a graph is alive, autograd expects a gradient of the old shape for this parameter.
    # Changing the dtype in between resets the expectation.
    other_dtype = torch.float32 if data.dtype == torch.float64 else torch.float64
    placeholder = data.new_empty(0, dtype=other_dtype)

    @torch.no_grad()
    def write() -> None:
        old_shape = parameter.shape
        parameter.grad = None
        parameter.data = placeholder
        parameter.data = data
        for hook in reshape_hooks:
            hook(old_shape, data.shape)

    return write


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is Transformers' `Conv1D`, without importing Transformers."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def dense_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear layer, dense or block-sparse."""
    if is_conv1d(layer):
        weight = cast(Tensor, layer.weight)
        return weight.shape[1], weight.shape[0]
    return cast(int, layer.out_features), cast(int, layer.in_features)


def dense_weight_of(linear: nn.Module) -> Tensor:
    """Return the weight of a dense linear layer as `[out_features, in_features]`, detached."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if is_conv1d(linear) else weight


def density_of(layers: Iterable[BlockSparseLinear]) -> float:
    """Return present blocks / all blocks, over several layers."""
    topologies = [layer.topology for layer in layers]
    n_blocks = sum(topology.n_blocks for topology in topologies)
    return n_blocks / max(1, sum(topology.grid[0] * topology.grid[1] for topology in topologies))


def largest_blocks(
    weight: Tensor, grid: tuple[int, int], n_blocks: int, *, floor: tuple[int, int] = (0, 0)
) -> Tensor:
    """Return the block mask, on the CPU, of the blocks of largest Frobenius norm.

    Args:
        weight: `[out_features, in_features]`.
        grid: (out_blocks, in_blocks).
        n_blocks: number of blocks in the mask.
        floor: minimum number of blocks of (each row, each column), as in `exchange_blocks`.
    """
    return first_blocks(dense_block_norms(weight, grid).cpu(), n_blocks, floor=floor)


def _zero_norms(grid: tuple[int, int], device: torch.device) -> Tensor:
    return torch.zeros(grid, dtype=torch.float32, device=device, requires_grad=True)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Return `x` in the dtype that autocast uses for products."""
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast uses for a product of `x`; None if it does not apply."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the ops support the dtype."""
    if dtype not in _DTYPES:
        raise ValueError(
            f"`dtype` must be one of {_names_of(_DTYPES)}; got {dtype}. Convert the layer first."
        )


def _names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_fits(topology: BlockTopology, out_features: int, in_features: int) -> None:
    if (topology.out_features, topology.in_features) != (out_features, in_features):
        raise ValueError(
            f"`topology` must be for a weight [{out_features}, {in_features}]; "
            f"got one for [{topology.out_features}, {topology.in_features}]."
        )
