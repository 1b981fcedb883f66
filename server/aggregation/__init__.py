"""From updates to new weights: screening, centre weights, means, robust rules, server optimiser, central privacy.

Sends no message and writes no report."""
