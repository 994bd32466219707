"""`BlockSparseLinear`: a drop-in for `nn.Linear` that stores and computes only present blocks."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparse_lightning.kernels import choice, ops
from sparse_lightning.policy.criteria import block_magnitudes, dense_block_norms
from sparse_lightning.policy.evolution import TopologyUpdate, choose_blocks
from sparse_lightning.sharding import (
    all_slots,
    at_local_slots,
    is_sharded,
    local_part,
    local_slots,
    whole,
)
from sparse_lightning.topology import BlockTopology, block_grid, count_blocks

# What a layer has beside its parameters and its sizes.
_EQUIPMENT = (
    "topology",
    "block_size",
    "locked",
    "armed",
    "_armed",
    "block_norms",
    "token_stride",
    "label",
    "lineage",
    "has_learnt",
    "dense_class",
)

# All block-sparse layers that there are, for those who look for copies of some.
LIVING: WeakSet[BlockSparseLinear] = WeakSet()

# Since PyTorch 2.7. Some versions of Dynamo take it for true wherever they compile.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Called with the shape that a parameter had, and the one that it was given.
when_reshaped: list[Callable[[torch.Size, torch.Size], None]] = []


# Dynamo, by which the exporter tries again, would take the question itself for false.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


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
        label: the layer's name in the model in which it was swapped, for messages.
        lineage: what a layer shares with its copies, and with those that had equal weights when
            they were swapped.
        has_learnt: whether it was trained since: then it is a copy no more.
        dense_class: what it was before, and `make_dense_` makes of it: `nn.Linear`, or a class
            whose weight lies transposed, `[in_features, out_features]`, as transformers' `Conv1D`.

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
    dense_class: type[nn.Module] = nn.Linear

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
        dtype = dtype or torch.get_default_dtype()
        check_dtype(dtype)
        self.in_features, self.out_features = in_features, out_features
        shape = (topology.capacity, topology.block_size, topology.block_size)
        self.values = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        self._equip(topology)
        self.reset_parameters()

    def _equip(self, topology: BlockTopology) -> None:
        """Set all that the layer has beside its parameters and its sizes."""
        # Its own copy: an update of this layer must not move the blocks of another. Like the
        # tensors below it is built on the CPU, also under `with torch.device("meta")`. They are no
        # buffers: averaging callbacks average integer buffers, and DDP's broadcast of buffers would
        # hide a rank whose topology has diverged.
        self.topology = BlockTopology(topology.coords, topology.grid, topology.block_size)
        self.block_size = topology.block_size
        self.locked = False
        self.armed = False
        self._armed = torch.zeros((), dtype=torch.bool, device="cpu")
        self.block_norms = _zero_norms(topology.grid, torch.device("cpu"))
        self.token_stride = 1
        self.label = ""
        self.lineage = uuid.uuid4().hex
        self.has_learnt = False
        LIVING.add(self)
        self._follow_device()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_size: int = 64,
        density: float | None = None,
        topology: BlockTopology | None = None,
    ) -> BlockSparseLinear:
        """Build the layer from a dense one, keeping its weights at the present blocks.

        Args:
            linear: an `nn.Linear`, or transformers' `Conv1D`; not changed. Its device, dtype and
                `requires_grad` are taken over.
            block_size: 16, 32, 64 or 128.
            density: how many of the blocks to keep: those of largest Frobenius norm.
            topology: which blocks to keep, instead of `density`.
        """
        if (density is None) == (topology is None):
            raise ValueError("Exactly one of `density` and `topology` must be given.")
        parameter, bias = cast(nn.Parameter, linear.weight), cast(Tensor | None, linear.bias)
        weight, (out_features, in_features) = dense_weight_of(linear), dense_shape(linear)
        if topology is None:
            assert density is not None
            grid = block_grid(out_features, in_features, block_size)
            mask = largest_blocks(weight, grid, count_blocks(density, grid[0] * grid[1]))
            topology = BlockTopology.from_mask(mask, block_size)
        layer = cls.__new__(cls)
        # On meta nothing is drawn, so the random state of the user's program stays as it was.
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
            layer.dense_class = type(linear)
            layer.nx, layer.nf = in_features, out_features  # for when it becomes one again
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
        """Raise ValueError unless `x` has the layer's input features.

        Raises:
            RuntimeError: while `torch.onnx.export` looks on, as ONNX has no such layer.
        """
        self._check_not_to_onnx()
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"The input's last dimension must be in_features={self.in_features}; "
                f"got shape {list(x.shape)}."
            )

    def _check_not_to_onnx(self) -> None:
        # Asked in what traces or exports only: the question imports the exporter.
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if (is_tracing or _is_exporting()) and _is_in_onnx_export():
            raise RuntimeError(
                "`torch.onnx.export` and `to_onnx` must be given a dense model, as ONNX has no "
                f"block-sparse layers; got a BlockSparseLinear{self._where()}. Use "
                "`sparse-lightning export --to onnx` or `sparse_lightning.export.write_onnx`, "
                "which make it dense first."
            )

    def _where(self) -> str:
        """Return the end of a message about this layer."""
        label = self.__dict__.get("label", "")
        return f" (layer '{label}')" if label else ""

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

    def agrees_with(self, other: BlockSparseLinear) -> bool:
        """Tell whether both have the same weights in the blocks that both have, and have some."""
        mine, theirs = self.dense_weight(), other.dense_weight().to(self.values)
        if mine.shape != theirs.shape:
            return False
        both = (mine != 0) & (theirs != 0)
        return bool(both.any()) and torch.equal(mine[both], theirs[both])

    @torch.no_grad()
    def take_blocks_of(self, other: BlockSparseLinear) -> None:
        """Have the blocks of another layer of the same sizes, in the same slots.

        The weights of blocks that both have stay; those of others are the other layer's. Of sharded
        values every rank must call this.
        """
        at, of = self.topology, other.topology
        same_slots = (at.capacity, at.block_size) == (of.capacity, of.block_size)
        if same_slots and torch.equal(at.coords, of.coords.to(at.device)):
            return
        theirs = whole(other.values.detach())
        if at.block_size == of.block_size:
            mine, device = whole(self.values.detach()), theirs.device
            present = of.coords[:, 0] >= 0
            rows, cols = of.coords.long().clamp_min(0).unbind(1)
            slots = at.slots.to(of.device)[rows, cols].long().masked_fill(~present, -1).to(device)
            common = (slots >= 0).view(-1, 1, 1)
            theirs = torch.where(common, mine.to(theirs)[slots.clamp_min(0)], theirs)
        self._adopt(of)
        local_part(self.values).copy_(theirs[local_slots(self.values)])

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
        follow (`optimizer_state.prepare_keep`). `topology` becomes another object. Call it between
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
        if self.is_shared:
            raise RuntimeError(
                "A layer must not lie in shared memory when it shrinks, as other processes would "
                f"keep its old values; got one after `share_memory()`{self._where()}. Shrink "
                "before, or keep the capacity."
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
        write_data = _prepare_data(values, data)

        def write() -> None:
            self.topology = topology
            write_data()
            values.grad = grad

        return kept, write

    def __getstate__(self) -> dict[str, Any]:
        # A copy is no part of the training: nothing follows its blocks, and nobody reads its norms.
        # What only a training has is made anew, not copied: a process that is started by pickling
        # has to find all tensors of the state alive once it runs.
        state = {**self.__dict__, "locked": False, "armed": False, "has_learnt": False}
        return {k: v for k, v in state.items() if k not in ("block_norms", "_armed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        device = self.topology.device
        self._armed = torch.zeros((), dtype=torch.bool, device=device)
        self.block_norms = _zero_norms(self.topology.grid, device)
        LIVING.add(self)

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
        example = self._example_of(fn)
        # The function itself must not see the indices: `.double()` would make them floats, and
        # `.to_empty()` would leave them undefined.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        # `share_memory()`: whoever shares the values needs the blocks that they belong to.
        shared = example.device.type == "cpu" and example.is_shared()
        if shared:
            self.topology.share_memory_()
        elif self.is_shared and not self.values.is_shared():  # of another dtype, values lie apart
            at = self.topology
            self.topology = BlockTopology(at.coords, at.grid, at.block_size)
        return self

    @property
    def is_shared(self) -> bool:
        """Whether other processes see its blocks change, by `share_memory()`."""
        return self.topology.is_shared

    @property
    def transposed(self) -> bool:
        """Whether its dense weight lies as `[in_features, out_features]`."""
        return self.dense_class is not nn.Linear

    def _example_of(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what `fn` makes of a tensor like `values`; no parameter is changed.

        Raises:
            TypeError: if that has a dtype that is not offered. Layers that come before this one in
                a model have been converted by then.
        """
        values = self.values
        example = fn(torch.empty(1, dtype=values.dtype, device=values.device))
        if example.dtype not in _DTYPES:
            raise TypeError(
                f"The dtype of a block-sparse layer must be one of {_names_of(_DTYPES)}; got "
                f"{example.dtype}{self._where()}. Call `densify(model)` before, or leave the layer "
                "dense by `exclude`."
            )
        return example

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the tensors, where PyTorch keeps versions: copies know one another once loaded.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["lineage"], metadata["label"] = self.lineage, self.label
            metadata["has_learnt"] = self.has_learnt

    def get_extra_state(self) -> Tensor:
        """Return the topology, for the state dict; int32, of a length fixed by the capacity."""
        return self.topology.to_state(self.transposed)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the topology that a state holds, for values that are there already or come next."""
        topology = BlockTopology.from_state(state)
        _check_fits(topology, self.out_features, self.in_features)
        shape = (topology.capacity, topology.block_size, topology.block_size)
        if self.values.shape == shape and topology.capacity != self.topology.capacity:
            self.topology = topology  # whoever loads has put the values there, and not through us
            self._follow_device()
        else:
            self._adopt(topology)

    # There is no dense weight to read, and what is written to one would be lost. Who tries, as to
    # tie it to another, learns which layer it is about.

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self._refuse_weight()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._refuse_weight()
        super().__setattr__(name, value)

    def _refuse_weight(self) -> NoReturn:
        pattern = self.__dict__.get("label") or "<its name>"
        raise AttributeError(
            f"A block-sparse layer has no `weight`, only the present blocks, `values`"
            f"{self._where()}. `dense_weight()` computes it, to read. Where a model reads or ties "
            f"the weight, leave the layer dense: exclude=[{pattern!r}]."
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
            # Always raised by `load_state_dict`, also with strict=False.
            error_msgs.append(f"{error} (layer '{prefix.rstrip('.')}')")
            return
        if "lineage" in local_metadata:
            self.lineage = local_metadata["lineage"]
            # What another layer has learnt makes this one its copy.
            is_own = local_metadata.get("label") == self.label
            self.has_learnt = is_own and bool(local_metadata.get("has_learnt"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_topology(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the topology and the capacity of a state dict, before its values are copied."""
        state = state_dict.get(prefix + "_extra_state")
        if isinstance(state, Tensor) and state.is_floating_point():
            # A mean of state dicts, as of a network and its target, whose blocks are the same.
            rounded, own = state.round().int(), self.get_extra_state()
            if rounded.shape == own.shape and torch.equal(rounded.to(own.device), own):
                state = state_dict[prefix + "_extra_state"] = own
        values = state_dict.get(prefix + "values")
        weight = state_dict.pop(prefix + "weight", None) if values is None else None
        if weight is not None and weight.dim() == 3:
            # The blocks, as the files of Transformers' `save_pretrained` have them.
            values, weight = weight, None
            state_dict[prefix + "values"] = values
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
            weight = weight.T if self.transposed else weight
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
            coords = topology.coords.to(self.topology.device)
            if not torch.equal(coords, self.topology.coords):
                self.topology.assign_(coords)
            return
        if self.locked:
            raise RuntimeError(
                f"A layer in training must keep its capacity {self.topology.capacity} and block "
                f"size {self.block_size}; the state dict has {topology.capacity} and "
                f"{topology.block_size}. Load it before the optimizer is built."
            )
        self.topology = BlockTopology(topology.coords, topology.grid, topology.block_size)
        self.block_size = topology.block_size
        self.block_norms = _zero_norms(topology.grid, self.block_norms.device)
        # The parameter object stays, so that ties and optimizers yet without state still hold it.
        shape = (topology.capacity, topology.block_size, topology.block_size)
        _set_data(self.values, self.values.detach().new_zeros(shape))
        self._follow_device()


@torch.no_grad()
def make_sparse_(
    linear: nn.Module, topology: BlockTopology, scale: float = 1.0, label: str = ""
) -> BlockSparseLinear:
    """Turn an `nn.Linear` into a `BlockSparseLinear`: the object stays, as does its parameter.

    The weight's Parameter becomes `values`, with other data. So whatever refers to one of them goes
    on: lists of layers, hooks of either, attributes, optimizers.

    Args:
        linear: an `nn.Linear`, or transformers' `Conv1D`.
        topology: the blocks to keep.
        scale: factor of the weights that are kept.
        label: the layer's name, for messages.
    """
    dense_class = type(linear)
    weight = cast(nn.Parameter, linear.weight)
    transposed = is_conv1d(linear)
    data = topology.pack(dense_weight_of(linear)).mul_(scale)
    _rename_parameter(linear, "weight", "values")
    _set_data(weight, data)
    linear.__class__ = BlockSparseLinear
    layer = cast(BlockSparseLinear, linear)
    layer.out_features, layer.in_features = topology.out_features, topology.in_features
    if transposed:
        layer.dense_class = dense_class
    layer._equip(topology)
    layer.label = label
    return layer


@torch.no_grad()
def make_dense_(layer: BlockSparseLinear) -> nn.Module:
    """Undo `make_sparse_`: the object becomes what it was, and `values` the dense weight.

    Raises:
        RuntimeError: while an optimizer is attached that evolves the layer.
    """
    if layer.locked:
        raise RuntimeError(
            "A layer must not be evolved by a Sparsifier when it becomes dense; got one that is "
            f"attached to an optimizer{layer._where()}. Call `detach()` first, or densify a copy."
        )
    weight = layer.dense_weight()
    weight = weight.T.contiguous() if layer.transposed else weight
    values, dense_class = layer.values, layer.dense_class
    LIVING.discard(layer)
    sizes = ("in_features", "out_features") if layer.transposed else ()
    for name in (*_EQUIPMENT, *sizes):
        vars(layer).pop(name, None)
    _rename_parameter(layer, "values", "weight")
    layer.__class__ = dense_class  # type: ignore[assignment]
    _set_data(values, weight)
    return layer


def _rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Give a parameter another name at its place."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({new if n == old else n: p for n, p in parameters.items()})


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, and no gradient; the object stays."""
    _prepare_data(parameter, data)()


def _prepare_data(parameter: nn.Parameter, data: Tensor) -> Callable[[], None]:
    """Return what `_set_data` does, as a function that takes no memory of tensors."""
    # A graph that is still held remembers the old shape for the gradient of this parameter, and
    # autograd would refuse the next one. It forgets when the dtype changes.
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    nothing = data.new_empty(0, dtype=other)

    @torch.no_grad()
    def write() -> None:
        before = parameter.shape
        parameter.grad = None
        parameter.data = nothing
        parameter.data = data
        for tell in when_reshaped:
            tell(before, data.shape)

    return write


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether it is what GPT-2 has for linear layers; without importing where it is from."""
    of = type(module)
    return of.__name__ == "Conv1D" and of.__module__ == "transformers.pytorch_utils"


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
    """Return present blocks / all blocks of some layers together."""
    topologies = [layer.topology for layer in layers]
    blocks = sum(at.grid[0] * at.grid[1] for at in topologies)
    return sum(at.n_blocks for at in topologies) / max(1, blocks)


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
