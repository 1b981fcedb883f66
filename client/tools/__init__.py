"""What a hospital runs by hand: predictions with a finished model, a self-check, a metrics endpoint.

Not part of a federation's round."""
