"""What a delta shows: trees, pictures, tables, and the page for selecting modules."""
