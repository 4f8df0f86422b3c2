"""Layers with running statistics: which modules they are, and snapshots of their values."""
