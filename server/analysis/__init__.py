"""What is computed from sums over centres: scores, image drift, clustering, the source head's discriminant.

Sees sums only, never a scan."""
