"""The state of one run and how it talks to the centres: transport, broadcast, checkpoint, operator commands.

Knows no round loop and no aggregation rule.
"""
