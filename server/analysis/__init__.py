"""What is computed from sums over centres: scores, image drift, clustering, the source head's discriminant.

It sees sums only, never a scan.
"""
