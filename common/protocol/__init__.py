"""What crosses a hospital's wall: the messages, how updates are encoded, and the code fingerprint that both sides compare.

A field that is not in ``messages`` cannot be sent. Only ``flower_records`` knows Flower."""
