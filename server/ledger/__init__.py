"""The run ledger: its database, tables, views and audit trail, and the migration of older ledgers.

It records what happened and decides nothing; it does not know what a run is made of.
"""
