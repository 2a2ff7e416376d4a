"""What a delta is, apart from any module system: structure, edits, linear maps, methods, configurations."""
