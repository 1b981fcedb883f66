"""Answers to the coordinator's requests: local rounds, additive queries, secure sums, parameters kept at the centre.

The only room that handles messages; it decides nothing that the policy decides (``client/site``)."""
