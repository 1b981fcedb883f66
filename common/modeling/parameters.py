"""Hold a model's weights in one flat float32 buffer and one int64 buffer instead of in many tensors.

Both sides derive the same layout from the configuration, so tensors need no names on the wire, and the
coordinator's sum is one pass over memory.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.utils.errors import ConsiliumError

Array = NDArray[np.generic]
EMPTY_PARAMS = np.empty(0, np.float32)  # in place of a message's float values that are not sent in full


@dataclass(frozen=True)
class TensorSlot:
    """The position of one tensor in its flat buffer."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    group: str  # "backbone", "decoder", or the task of the head it belongs to
    is_parameter: bool  # False: a buffer such as a batch norm's statistics, which norms of updates leave out
    is_batch_norm: bool

    @property
    def span(self) -> slice:
        """The tensor's range in the buffer."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """The number of the tensor's values."""
        return self.stop - self.start


@dataclass(frozen=True)
class Weights:
    """The values of a model in the order of its layout."""

    floats: NDArray[np.float32]  # [P]
    int_buffers: NDArray[np.int64]  # [Q]

    def copy(self) -> Weights:
        """Return weights in memory of their own."""
        return Weights(self.floats.copy(), self.int_buffers.copy())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all values, computed once: do not change the arrays afterwards."""
        sha256 = hashlib.sha256(np.ascontiguousarray(self.floats).data)
        sha256.update(np.ascontiguousarray(self.int_buffers).data)
        return sha256.hexdigest()


@dataclass(frozen=True)
class Layout:
    """The positions of all tensors of a model. Models of the same configuration have equal layouts."""

    floats: list[TensorSlot] = field(default_factory=list)
    int_buffers: list[TensorSlot] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The number P of float values."""
        return self.floats[-1].stop if self.floats else 0

    @property
    def int_buffer_size(self) -> int:
        """The number Q of integer values."""
        return self.int_buffers[-1].stop if self.int_buffers else 0

    @property
    def parameter_slots(self) -> list[TensorSlot]:
        """The trainable tensors."""
        return [slot for slot in self.floats if slot.is_parameter]

    @property
    def num_parameters(self) -> int:
        """The number V of trainable values."""
        return sum(slot.size for slot in self.parameter_slots)

    def group_slices(self) -> dict[str, list[slice]]:
        """Return each group's ranges in the float buffer, with adjacent tensors joined."""
        slices_by_group: dict[str, list[slice]] = {}
        for slot in self.floats:
            slices = slices_by_group.setdefault(slot.group, [])
            if slices and slices[-1].stop == slot.start:
                slices[-1] = slice(slices[-1].start, slot.stop)
            else:
                slices.append(slot.span)
        return slices_by_group

    def parameter_mask(self) -> NDArray[np.bool_]:
        """Return a mask [P] that is True for trainable values.

        Batch-norm statistics are 0.5 % of the values but make up nearly all of an update's norm.
        """
        mask = np.zeros(self.size, dtype=bool)
        for slot in self.floats:
            mask[slot.span] = slot.is_parameter
        return mask

    def match_patterns(self, patterns: Sequence[str]) -> list[TensorSlot]:
        """Return the tensors whose name matches one of the fnmatch patterns, without duplicates.

        Raises:
            ConsiliumError: A pattern matches no tensor.
        """
        matches: dict[str, TensorSlot] = {}
        for pattern in patterns:
            any_match = False
            for slot in (*self.floats, *self.int_buffers):
                if fnmatch.fnmatch(slot.name, pattern):
                    matches[slot.name] = slot
                    any_match = True
            if not any_match:
                first = self.floats[0].name
                last = self.floats[-1].name
                raise ConsiliumError(
                    f"pattern '{pattern}' matches no weight; names look like '{first}', '{last}'"
                )
        return list(matches.values())

    def to_state_dict(self, weights: Weights) -> dict[str, Array]:
        """Return {tensor name: array}, the content of a state dict and of a safetensors file."""
        state: dict[str, Array] = {}
        for slot in self.floats:
            state[slot.name] = weights.floats[slot.span].reshape(slot.shape)
        for slot in self.int_buffers:
            state[slot.name] = weights.int_buffers[slot.span].reshape(slot.shape)
        return state

    def from_state_dict(self, state: Mapping[str, Array]) -> Weights:
        """Return the weights of a state dict, the inverse of `to_state_dict`.

        Raises:
            ConsiliumError: A tensor is missing or has another shape.
        """
        weights = Weights(np.empty(self.size, np.float32), np.empty(self.int_buffer_size, np.int64))
        for slot in self.floats:
            weights.floats[slot.span] = _read_tensor(state, slot)
        for slot in self.int_buffers:
            weights.int_buffers[slot.span] = _read_tensor(state, slot)
        return weights


def _read_tensor(state: Mapping[str, Array], slot: TensorSlot) -> Array:
    """Return a state dict's tensor as a flat array."""
    if slot.name not in state:
        raise ConsiliumError(f"the weights lack '{slot.name}'; they belong to another backbone or recipe")
    shape = tuple(state[slot.name].shape)
    if shape != slot.shape:
        raise ConsiliumError(
            f"'{slot.name}' has shape {shape} but the model needs {slot.shape}; "
            "the weights belong to another backbone or recipe"
        )
    return np.asarray(state[slot.name]).reshape(-1)


def build_layout(model: nn.Module) -> Layout:
    """Derive a model's layout. `heads.<task>` and `decoder` are groups; everything else is the backbone."""
    batch_norms: set[str] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            batch_norms.add(module_name)
    parameter_names = {name for name, _ in model.named_parameters()}
    layout = Layout()
    for name, tensor in model.state_dict().items():
        slots = layout.floats if tensor.is_floating_point() else layout.int_buffers
        start = slots[-1].stop if slots else 0
        slots.append(
            TensorSlot(
                name=name,
                shape=tuple(tensor.shape),
                start=start,
                stop=start + tensor.numel(),
                group=_group_of(name),
                is_parameter=name in parameter_names,
                is_batch_norm=name.rpartition(".")[0] in batch_norms,
            )
        )
    return layout


def _group_of(tensor_name: str) -> str:
    """Return the group of a tensor: its head's task, "decoder" or "backbone"."""
    parts = tensor_name.split(".")
    if parts[0] == "heads":
        return parts[1]
    if parts[0] == "decoder":
        return "decoder"
    return "backbone"


def get_model_weights(model: nn.Module, layout: Layout) -> Weights:
    """Return a copy of the model's weights."""
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    return layout.from_state_dict(state)


@torch.no_grad()
def set_model_weights(model: nn.Module, layout: Layout, weights: Weights) -> None:
    """Copy weights into a model, whatever its device and memory format.

    Raises:
        ConsiliumError: The weights do not have the layout's sizes.
    """
    if weights.floats.shape != (layout.size,) or weights.int_buffers.shape != (layout.int_buffer_size,):
        raise ConsiliumError(
            f"received {weights.floats.size} weights for a model with {layout.size}; "
            "the two sides run different recipes or code"
        )
    state = model.state_dict()
    for slot in layout.floats:
        _copy_tensor(state[slot.name], weights.floats, slot)
    for slot in layout.int_buffers:
        _copy_tensor(state[slot.name], weights.int_buffers, slot)


def _copy_tensor(tensor: torch.Tensor, buffer: Array, slot: TensorSlot) -> None:
    """Copy one tensor from a flat buffer."""
    values = buffer[slot.span].copy()  # PyTorch warns about arrays that are read-only, as received ones are
    tensor.copy_(torch.from_numpy(values.reshape(slot.shape)))
