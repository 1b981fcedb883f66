"""Differential privacy accounting, noise, and the arithmetic of secure aggregation that both sides share.

Nothing here decides what may be sent: that is the hospital's policy (``client/site``)."""
