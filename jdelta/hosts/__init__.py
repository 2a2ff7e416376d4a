"""How edits are run on one kind of module system: a folder for each."""
