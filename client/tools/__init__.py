"""What a hospital runs by hand: predictions with a finished model, a self-check, metrics for its Prometheus.

No part of a federation's round.
"""
