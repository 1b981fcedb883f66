"""Settings of privacy: differential privacy and secure aggregation."""

from __future__ import annotations

from typing import Literal

from common.config.schema.base import config_dataclass, require, require_range


@config_dataclass
class SecureAggregationConfig:
    """Secure aggregation: the coordinator sees sums over centres, and no centre's own numbers."""

    # `model`: weight updates are hidden. `all`: counts, scores and every other query as well.
    scope: Literal["model", "all"] = "model"
    # Largest change of a parameter in a round, times the centre's weight.
    # More is clipped, and counted in the sum.
    clip_value: float = 4.0
    # Of a parameter: the grid's step is 2 clip_value / 2^bits.
    # log2(centres) bits more travel, in whole bytes.
    quantization_bits: int = 26
    threshold: float = 0.66  # fraction of the centres that began a sum who must stay to its end

    def __post_init__(self) -> None:
        """Check the ranges."""
        clip = self.clip_value
        bits = self.quantization_bits
        require(0 < clip <= 1e6, f"privacy.secagg.clip_value is {clip}; it must be above 0 and at most 1e6")
        require(8 <= bits <= 32, f"privacy.secagg.quantization_bits is {bits}; it must be 8 to 32")
        threshold = self.threshold
        require(0.5 <= threshold <= 1, f"privacy.secagg.threshold is {threshold}; it must be in [0.5, 1]")


@config_dataclass
class PrivacyConfig:
    """Differential privacy, and secure aggregation beside it.

    `patient`: each centre clips and adds noise to what it sends; the unit is the patient
    (client/training/dp_sgd.py). `central`: the coordinator does so with the aggregate; the unit is the centre
    (server/aggregation/central_dp.py).
    """

    dp_level: Literal["none", "patient", "central"] = "none"
    epsilon: float = 0.0  # privacy loss of all rounds of this run together; the noise follows from it. Or ...
    noise_multiplier: float = 0.0  # ... the noise's standard deviation, as a multiple of clip_norm
    delta: float = 1e-5  # probability of a larger loss; well below 1 / patients of the largest centre
    clip_norm: float = 1.0  # largest L2 norm of one patient's gradient, or of one centre's update
    # `patient`: noise multiplier of the scores, paid from the same epsilon; 0: scores are exact, and only of
    # patients that were never trained on.
    query_noise_multiplier: float = 0.0
    # `patient`: noise multiplier of the counts of labels, paid from the same epsilon, or that of the scores
    # where it is larger. Exact counts do not leave.
    count_noise_multiplier: float = 0.0
    max_scans_per_patient: int = 1  # that count in such a noisy answer
    # `central`: the clip norm follows this quantile of the updates' norms, from clip_norm on; 0: constant.
    adaptive_clip_quantile: float = 0.0
    secagg: SecureAggregationConfig | None = None  # not with `central`

    def __post_init__(self) -> None:
        """Check the ranges, and that either epsilon or the noise multiplier is given."""
        epsilon = self.epsilon
        noise = self.noise_multiplier
        require(0 <= epsilon <= 50, f"privacy.epsilon is {epsilon}; it must be above 0 and at most 50")
        require(
            noise == 0 or 0.3 <= noise <= 1000,
            f"privacy.noise_multiplier is {noise}; it must be 0.3 to 1000, or 0",
        )
        require(0 < self.delta <= 0.01, f"privacy.delta is {self.delta}; it must be above 0 and at most 0.01")
        require(0 < self.clip_norm <= 1e6, f"privacy.clip_norm is {self.clip_norm}; it must be above 0")
        self._check_statistics_noise()
        max_scans = self.max_scans_per_patient
        require(max_scans >= 1, f"privacy.max_scans_per_patient is {max_scans}; it must be 1 or more")
        require_range("privacy.max_scans_per_patient", max_scans, 1, 10_000)
        quantile = self.adaptive_clip_quantile
        require(0 <= quantile < 1, f"privacy.adaptive_clip_quantile is {quantile}; it must be in [0, 1)")
        require(
            self.dp_level == "none" or (epsilon > 0) != (noise > 0),
            f"privacy.epsilon is {epsilon} and privacy.noise_multiplier {noise}: one follows from the other; "
            "give one and set the other to 0",
        )

    def _check_statistics_noise(self) -> None:
        """Check the noise on counts and scores, which only `patient` has.

        That counts always have some is checked where a run is made (common/config/validate.py): the runs of
        version 0.1.0, which can still be read, had none.
        """
        is_patient = self.dp_level == "patient"
        query_noise = self.query_noise_multiplier
        count_noise = self.count_noise_multiplier
        require(
            query_noise == 0 or (is_patient and 0.3 <= query_noise <= 1000),
            f"privacy.query_noise_multiplier is {query_noise}; it must be 0.3 to 1000 with "
            "privacy=patient, or 0",
        )
        require(
            is_patient or count_noise == 0,
            f"privacy.count_noise_multiplier is {count_noise}; it needs privacy=patient, or set it to 0",
        )
        require(
            count_noise == 0 or 0.3 <= count_noise <= 1000,
            f"privacy.count_noise_multiplier is {count_noise}; it must be 0.3 to 1000",
        )
