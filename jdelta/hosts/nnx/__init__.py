"""Runs edits in flax.nnx modules."""
