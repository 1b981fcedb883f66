"""Compute metrics of a multiclass task from its confusion matrix, [K, K], rows true, columns predicted."""

from __future__ import annotations

from common.learning.metrics.shared import NO_LABELLED_SCANS, Array, Metrics, divide_or_none, undefined_names


def compute_multiclass_metrics(confusion: Array) -> Metrics:
    """Compute accuracy, balanced accuracy, G-mean and F1; classes without scans are left out.

    Balanced accuracy is the mean recall of the classes, G-mean the geometric mean of the recalls, F1 the mean
    over classes. With only one class these three would equal the accuracy, so they are None.
    """
    scans_by_class = confusion.sum(1)
    predictions_by_class = confusion.sum(0)
    correct_by_class = confusion.diagonal()
    total = float(scans_by_class.sum())
    metrics: Metrics = {
        "n": total,
        "accuracy": divide_or_none(float(correct_by_class.sum()), total),
        "balanced_accuracy": None,
        "gmean": None,
        "f1": None,
    }
    present = scans_by_class > 0
    recalls = correct_by_class[present] / scans_by_class[present]
    if len(recalls) > 1:
        f1_scores = 2 * correct_by_class[present] / (scans_by_class + predictions_by_class)[present]
        metrics["balanced_accuracy"] = float(recalls.mean())
        metrics["gmean"] = float(recalls.prod() ** (1 / len(recalls)))
        metrics["f1"] = float(f1_scores.mean())
    return metrics


def explain_undefined_multiclass(confusion: Array) -> dict[str, str]:
    """Return {metric: reason} for the metrics of `compute_multiclass_metrics` that are None."""
    total = confusion.sum()
    reason = NO_LABELLED_SCANS
    if total:
        reason = f"one class only ({total:.0f} scans)"
    return dict.fromkeys(undefined_names(compute_multiclass_metrics(confusion)), reason)
