"""What crosses a hospital's wall: the messages, the encoding of updates, and the code fingerprint.

Only the fields in ``messages`` can be sent. ``flower_records`` is the only module here that imports Flower.
"""
