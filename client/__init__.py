"""What runs inside a hospital. Never imports ``server``."""
