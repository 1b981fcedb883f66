"""Small helpers that every room may use: errors, files, logs, check results, hash chains, node keys.

Nothing here knows about models, messages or configuration."""
