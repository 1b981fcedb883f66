"""The console: web pages, commands to runs, accounts and log-in.

Reads the ledger and issues commands; it computes no result.
"""
