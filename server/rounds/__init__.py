"""The run's course: membership, the round loop, model selection, resume, cross-validation.

Aggregation rules live in ``server/aggregation``, messages in ``server/run``.
"""
