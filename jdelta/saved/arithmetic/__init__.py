"""Deltas made of several others."""
