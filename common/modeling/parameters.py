"""A model's weights as one flat float32 buffer and one int64 buffer, with a layout that both sides derive from the configuration.

One buffer instead of a thousand tensors: nothing to name on the wire, and the server's sum is one pass over memory.
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


@dataclass(frozen=True)
class TensorSlot:
    """One tensor's place in its buffer."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    group: str  # "backbone", "decoder", or the head's task
    is_parameter: bool  # false: a buffer (batch-norm statistics), kept out of norms
    is_batch_norm: bool

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Weights:
    """`floats` float32 [P], `integers` int64 [Q] in a layout's order."""

    floats: NDArray[np.float32]
    int_buffers: NDArray[np.int64]

    def copy(self) -> Weights:
        return Weights(self.floats.copy(), self.int_buffers.copy())

    @cached_property
    def digest(self) -> str:
        """Equal for equal bits; to be asked for when they change no more."""
        whole = hashlib.sha256(np.ascontiguousarray(self.floats).data)
        whole.update(np.ascontiguousarray(self.int_buffers).data)
        return whole.hexdigest()


EMPTY_PARAMS = np.empty(
    0, np.float32
)  # `floats` that are not in this message: the centre holds what they are made of


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a model lies. Two models of one configuration have equal layouts."""

    floats: list[TensorSlot] = field(default_factory=list)
    int_buffers: list[TensorSlot] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.floats[-1].stop if self.floats else 0

    @property
    def int_buffer_size(self) -> int:
        return self.int_buffers[-1].stop if self.int_buffers else 0

    def group_slices(self) -> dict[str, list[slice]]:
        """Contiguous runs of each group in the float buffer."""
        runs: dict[str, list[slice]] = {}
        for entry in self.floats:
            own = runs.setdefault(entry.group, [])
            if own and own[-1].stop == entry.start:
                own[-1] = slice(own[-1].start, entry.stop)
            else:
                own.append(entry.span)
        return runs

    def parameter_mask(self) -> NDArray[np.bool_]:
        """True [P] where a value is a parameter: batch-norm statistics are 0.5 % of the values and nearly all of an update's norm."""
        mask = np.zeros(self.size, dtype=bool)
        for entry in self.floats:
            mask[entry.span] = entry.is_parameter
        return mask

    def match_patterns(self, patterns: Sequence[str]) -> list[TensorSlot]:
        """Entries whose name matches any fnmatch pattern. Raises ConsiliumError for a pattern that matches nothing."""
        found = {
            e.name: e
            for p in patterns
            for e in (*self.floats, *self.int_buffers)
            if fnmatch.fnmatch(e.name, p)
        }
        for pattern in patterns:
            if not any(fnmatch.fnmatch(name, pattern) for name in found):
                raise ConsiliumError(
                    f"pattern '{pattern}' matches no weight; names look like '{self.floats[0].name}', '{self.floats[-1].name}'"
                )
        return list(found.values())

    def to_state_dict(self, weights: Weights) -> dict[str, Array]:
        """{tensor name: array}: what a state dict and a safetensors file hold."""
        out: dict[str, Array] = {e.name: weights.floats[e.span].reshape(e.shape) for e in self.floats}
        out.update({e.name: weights.int_buffers[e.span].reshape(e.shape) for e in self.int_buffers})
        return out

    def from_state_dict(self, state: Mapping[str, Array]) -> Weights:
        """The inverse of `named`. Raises ConsiliumError naming a tensor that is missing or has another shape."""
        weights = Weights(np.empty(self.size, np.float32), np.empty(self.int_buffer_size, np.int64))
        for entries, buffer in ((self.floats, weights.floats), (self.int_buffers, weights.int_buffers)):
            for e in entries:
                if e.name not in state:
                    raise ConsiliumError(
                        f"the weights lack '{e.name}'; they belong to another backbone or recipe"
                    )
                if tuple(state[e.name].shape) != e.shape:
                    raise ConsiliumError(
                        f"'{e.name}' has shape {tuple(state[e.name].shape)}, the model wants {e.shape}"
                    )
                buffer[e.span] = np.asarray(state[e.name]).reshape(-1)
        return weights


def build_layout(model: nn.Module) -> Layout:
    """The layout of a model whose heads are called `heads.<task>` and its decoder `decoder`; everything else is backbone."""
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    parameters = {name for name, _ in model.named_parameters()}
    layout = Layout()
    for name, tensor in model.state_dict().items():
        entries = layout.floats if tensor.is_floating_point() else layout.int_buffers
        start = entries[-1].stop if entries else 0
        parts = name.split(".")
        group = parts[1] if parts[0] == "heads" else "decoder" if parts[0] == "decoder" else "backbone"
        batch_norm = name.rpartition(".")[0] in norms
        entries.append(
            TensorSlot(
                name,
                tuple(tensor.shape),
                start,
                start + tensor.numel(),
                group,
                name in parameters,
                batch_norm,
            )
        )
    return layout


def get_model_weights(model: nn.Module, layout: Layout) -> Weights:
    """A copy of the model's weights."""
    return layout.from_state_dict({name: t.detach().cpu().numpy() for name, t in model.state_dict().items()})


@torch.no_grad()
def set_model_weights(model: nn.Module, layout: Layout, weights: Weights) -> None:
    """Copy the weights into the model, whatever its device or memory format."""
    if weights.floats.shape != (layout.size,) or weights.int_buffers.shape != (layout.int_buffer_size,):
        raise ConsiliumError(
            f"{weights.floats.size} weights came, the model has {layout.size}; the two sides run different recipes or code"
        )
    state = model.state_dict()
    for entries, buffer in ((layout.floats, weights.floats), (layout.int_buffers, weights.int_buffers)):
        for e in entries:
            state[e.name].copy_(
                torch.from_numpy(buffer[e.span].copy().reshape(e.shape))
            )  # torch warns of what may not be written to
