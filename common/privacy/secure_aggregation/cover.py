"""Find a secure sum that would show one centre's numbers because the others add next to nothing to it.

A sum hides its terms only where several centres add to it in like measure. The coordinator chooses the tasks
and their weights, what is frozen, how long centres train and how values are rounded, and so could let all
centres but one add zeros. The centres therefore tell each other, in the ciphertext of the secret shares that
the coordinator forwards, how large their part of each piece of the sum is: to a factor of two, a byte a
piece. A piece is a tensor of the model, a parameter group's weight, or one sum of a query. What a round
changes without data does not count (client/federation/change_without_data.py). Each centre checks its own
cover before it sends masked numbers, and everybody's before it helps to remove the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import Layout
from common.privacy.secure_aggregation.fixed_point import FRACTION_BITS
from common.privacy.secure_aggregation.settings import MIN_CENTRES
from common.protocol.messages import Sums

Magnitudes = NDArray[np.uint8]  # [pieces]: 0 where nothing is added, else 1 + floor(log2 of the L2 norm)
Piece = tuple[str, NDArray[np.generic]]  # name, and the steps that are added
MAX_RATIO_BITS = 6  # a part covers another one that is up to 2^6 to 2^7 times as large


class SumPieces(NamedTuple):
    """What a sum is made of, piece by piece."""

    names: list[str]  # a group of parameters, or the key of a query's sum; for error texts
    magnitudes: Magnitudes

    def minimum(self, other: SumPieces) -> SumPieces:
        """Return the same pieces with the smaller of both magnitudes."""
        return SumPieces(self.names, np.minimum(self.magnitudes, other.magnitudes))


def measure_update(values: NDArray[np.int32], sums: Sums, layout: Layout) -> SumPieces:
    """Measure the tensors of an update from `quantize_weighted_update`, and the weights of its groups."""
    pieces: list[Piece] = []
    parameter_offset = 0
    buffer_offset = 0
    for slot in layout.floats:
        if slot.is_parameter:
            pieces.append((slot.group, values[parameter_offset : parameter_offset + slot.size]))
            parameter_offset += slot.size
        else:
            pieces.append((slot.group, _to_steps(sums["buffers"][buffer_offset : buffer_offset + slot.size])))
            buffer_offset += slot.size
    for group, weight in zip(layout.group_slices(), sums["weights"], strict=True):
        pieces.append((group, _to_steps(np.array([weight]))))
    return _measure(pieces)


def measure_sums(sums: Sums) -> SumPieces:
    """Measure the sums of a query, each key a piece."""
    return _measure([(key, _to_steps(sums[key])) for key in sorted(sums)])


def _to_steps(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return values in the steps of a fixed-point number: what is below half a step is not sent."""
    return np.asarray(np.rint(np.ldexp(values, FRACTION_BITS)), np.float64)


def _measure(pieces: Sequence[Piece]) -> SumPieces:
    magnitudes = np.zeros(len(pieces), np.uint8)
    for i, (_, piece) in enumerate(pieces):
        norm = np.linalg.norm(np.asarray(piece, np.float64))
        magnitudes[i] = np.frexp(norm)[1]
    return SumPieces([name for name, _ in pieces], magnitudes)


def find_uncovered(
    magnitudes: Mapping[str, Magnitudes], centre: str, min_centres: int = MIN_CENTRES
) -> NDArray[np.intp]:
    """Return the pieces that would show a centre's numbers, if these centres' parts were added.

    Args:
        magnitudes: {centre in the sum: magnitudes of its part}, all of one length.
        centre: whose numbers must be covered.
        min_centres: how many centres, with this one, must add to a piece in like measure.
    """
    own_magnitudes = magnitudes[centre].astype(int)
    num_covering = np.zeros(len(own_magnitudes), int)
    for other, other_magnitudes in magnitudes.items():
        if other != centre:
            is_like = other_magnitudes.astype(int) + MAX_RATIO_BITS >= own_magnitudes
            num_covering += is_like & (other_magnitudes > 0)
    return np.flatnonzero((own_magnitudes > 0) & (num_covering < min_centres - 1))
