"""Blocks that protect running statistics."""
