"""The run ledger: its database, tables and views.

Stores what happened; decides nothing."""
