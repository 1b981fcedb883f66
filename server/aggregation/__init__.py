"""From updates to the next weights: screening, weighting, means, server optimiser, privacy.

It trains nothing and writes no report.
"""
