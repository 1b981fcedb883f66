"""The hospital's own settings and records: site file, policy, privacy budget, egress log.

Nothing here reads scans or trains; no value here is taken from a message without a check.
"""
