"""Small helpers for every room: errors, files, logs, check results, hash chains, node keys.

Nothing here knows about models, messages or configuration.
"""
