"""Which keys have an effect, given the others: a key that is set to no effect is refused.

Whoever sets a key expects something of it, such as protection. `privacy.epsilon=3` without `privacy=patient`
would protect nobody in silence. Every key of the schema stands in one rule of these modules, or among the
keys that always have an effect.
"""
