"""For busy machines: one thread (tensors are small, more would only wait for each other; set before torch is loaded), no deadlines."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
