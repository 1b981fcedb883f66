"""How a run is doing right now: status, health, Prometheus metrics, the terminal view.

Reads the ledger and changes nothing.
"""
