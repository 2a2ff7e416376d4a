"""The delta methods, one file each."""
