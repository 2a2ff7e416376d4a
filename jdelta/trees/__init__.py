"""Pure functions on parameter trees: surgery, names and patterns of leaves, masks, fingerprints."""
