"""Secure aggregation: what both sides compute alike. The coordinator learns only the sum of all values.

The protocol is that of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine
learning", CCS 2017, figure 4, for an honest-but-curious server. Every pair of centres shares a mask; the
sparser graph of Bell et al., CCS 2020, would pay off beyond a hundred centres. A sum takes four steps:

1. TrainRequest or StatisticsRequest: the centre computes its values, stores them, and replies with public
   keys generated for this sum (client/federation/secure_aggregation.py).
2. ShareKeysRequest: it splits its two secrets (the seed of its own mask, and the private key of its pairwise
   masks) into shares and encrypts one share for every other centre, with the magnitudes of its part.
3. MaskedInputRequest: it sends its values plus its own mask, plus or minus a mask for each other centre. The
   pairwise masks cancel in the sum.
4. UnmaskRequest: for each centre in the sum it reveals a share of the seed of that centre's own mask; for
   each centre that dropped out, a share of the private key. It never reveals both
   (server/run/secure_aggregation.py).

Values are integers added modulo 2^(8 bytes), so the sum is exact in any order of arrival. Parameters are
quantized with a step of 2 clip / 2^bits, so a value within the clip is off by at most half a step, clip /
2^bits. All other values are 64-bit fixed-point numbers with steps of 2^-24, in which counts are exact.

X25519, HKDF-SHA256, ChaCha20-Poly1305 and AES-256-CTR come from `cryptography`, Shamir's secret sharing from
PyCryptodome, as in Flower. Flower's own mask generator (`pseudo_rand_gen`) is not used because it reduces the
seed to the 32 bits of a Mersenne Twister, few enough for a server to try them all.

Masks depend on everything that was sent: the settings, weights and centroids, and the participants with their
keys. Centres that received different requests (another model for one of them: Pasquini et al., CCS 2022)
derive different masks, and the sum is noise.

A sum hides its terms only where several are of like size, and the coordinator chooses what is summed: tasks,
weights, what is frozen, how values are rounded. Each centre therefore encrypts for the others, with their
shares, how large its part of each piece of the sum is. It sends no masked values where fewer than two others
add to a piece in like measure, and no secret for a set of survivors that leaves any of them so uncovered
(cover.py). A round is opened once: not again with another request, whose difference could show more.
"""

from common.privacy.secure_aggregation.cover import (
    Magnitudes,
    SumPieces,
    find_uncovered,
    measure_sums,
    measure_update,
)
from common.privacy.secure_aggregation.fixed_point import (
    RingValues,
    bytes_per_parameter,
    from_fixed_point,
    pack_ring_values,
    quantization_step,
    quantize,
    ring_dtype,
    to_fixed_point,
    to_signed_integers,
    unpack_ring_values,
)
from common.privacy.secure_aggregation.key_agreement import (
    ByteArray,
    PublicKeys,
    derive_public_key,
    derive_shared_key,
    hash_mask_context,
    parse_public_keys,
)
from common.privacy.secure_aggregation.masks import BLOCK_SIZE, add_mask, compute_pair_sign, expand_seed
from common.privacy.secure_aggregation.secret_sharing import shamir_combine, shamir_split
from common.privacy.secure_aggregation.settings import (
    COMBINED_COHORT,
    MIN_CENTRES,
    compute_min_survivors,
    hides_statistics,
    require_secagg_config,
    uses_secagg,
)
from common.privacy.secure_aggregation.update_sums import (
    MaskableUpdate,
    dequantize_mean,
    empty_update_sums,
    flatten_sums,
    quantize_weighted_update,
    unflatten_sums,
)

__all__ = [
    "BLOCK_SIZE",
    "COMBINED_COHORT",
    "MIN_CENTRES",
    "ByteArray",
    "Magnitudes",
    "MaskableUpdate",
    "PublicKeys",
    "RingValues",
    "SumPieces",
    "add_mask",
    "bytes_per_parameter",
    "compute_min_survivors",
    "compute_pair_sign",
    "dequantize_mean",
    "derive_public_key",
    "derive_shared_key",
    "empty_update_sums",
    "expand_seed",
    "find_uncovered",
    "flatten_sums",
    "from_fixed_point",
    "hash_mask_context",
    "hides_statistics",
    "measure_sums",
    "measure_update",
    "pack_ring_values",
    "parse_public_keys",
    "quantization_step",
    "quantize",
    "quantize_weighted_update",
    "require_secagg_config",
    "ring_dtype",
    "shamir_combine",
    "shamir_split",
    "to_fixed_point",
    "to_signed_integers",
    "unflatten_sums",
    "unpack_ring_values",
    "uses_secagg",
]
