"""What hospitals and the coordinator must agree on. Imports neither ``client`` nor ``server``."""
