"""Answer the coordinator's requests: local rounds, additive queries, secure sums, layers kept at the centre.

The only room that handles messages; it decides nothing that the policy decides (``client/site``).
"""
