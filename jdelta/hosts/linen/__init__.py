"""Runs edits in flax.linen modules."""
