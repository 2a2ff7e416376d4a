"""Many devices and many deltas."""
