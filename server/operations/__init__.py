"""What an operator sets up and keeps: simulation, SuperLink, provisioning, kits, back-up, self-check.

Not imported by the round loop.
"""
