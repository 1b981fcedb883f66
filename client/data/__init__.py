"""Cohorts and data sets: which scans a centre has, their labels and splits, and batches of them.

Reads what `client/imaging` stored; does not train and sends nothing.
"""
