"""Settings for busy machines: one thread, since more would only wait for each other, and no deadlines."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is loaded
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
