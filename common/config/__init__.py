"""The typed configuration of a run: its schema, how it is composed from ``configs/``, and how it is checked.

Knows no data, no model and no Flower; only ``schema`` is imported by code that runs where there is only
PyTorch.
"""
