"""The coordinator. Never imports ``client``."""
