"""Compute performance metrics from sums that are additive over centres.

The coordinator knows a model's performance from such sums only: the sum over all centres is the pooled sum,
and no scan's own score leaves its hospital. Each kind of task has its own (for masks and severities see
common/learning/segmentation_metrics.py):

- binary: a histogram of scores, float64 [2, bins] (module `binary`)
- multiclass: a confusion matrix, float64 [K, K], rows true, columns predicted (module `multiclass`)
- regression: nine sums of errors, labels and predictions (module `regression`)
- any: the summed loss and the number of scans (module `summary`)

A metric that is undefined is None, never 0 and never 0.5. For each `compute_..._metrics` there is a function
`explain_undefined_...` that says why.
"""

from common.learning.metrics.binary import (
    CalibrationCurve,
    RocCurve,
    bin_edges,
    compute_binary_metrics,
    compute_calibration_curve,
    compute_challenge_score,
    compute_roc_curve,
    compute_score_histogram,
    explain_undefined_binary,
)
from common.learning.metrics.multiclass import compute_multiclass_metrics, explain_undefined_multiclass
from common.learning.metrics.regression import (
    compute_regression_metrics,
    compute_regression_sums,
    explain_undefined_regression,
)
from common.learning.metrics.shared import (
    NO_LABELLED_SCANS,
    Array,
    Metrics,
    check_not_nan,
    compute_f1,
    divide_or_none,
    flatten_rows,
    undefined_names,
)
from common.learning.metrics.summary import (
    COUNT_METRICS,
    LOWER_IS_BETTER,
    PRIMARY_METRICS,
    compute_loss_metrics,
    explain_undefined_loss,
    primary_metric,
    summarise_centres,
)

__all__ = [
    "COUNT_METRICS",
    "LOWER_IS_BETTER",
    "NO_LABELLED_SCANS",
    "PRIMARY_METRICS",
    "Array",
    "CalibrationCurve",
    "Metrics",
    "RocCurve",
    "bin_edges",
    "check_not_nan",
    "compute_binary_metrics",
    "compute_calibration_curve",
    "compute_challenge_score",
    "compute_f1",
    "compute_loss_metrics",
    "compute_multiclass_metrics",
    "compute_regression_metrics",
    "compute_regression_sums",
    "compute_roc_curve",
    "compute_score_histogram",
    "divide_or_none",
    "explain_undefined_binary",
    "explain_undefined_loss",
    "explain_undefined_multiclass",
    "explain_undefined_regression",
    "flatten_rows",
    "primary_metric",
    "summarise_centres",
    "undefined_names",
]
