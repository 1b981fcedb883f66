"""Differential privacy accounting, noise, and the arithmetic of secure aggregation that both sides share.

What may be sent is not decided here but by the hospital's policy (``client/site``).
"""
