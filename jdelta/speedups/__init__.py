"""Faster or leaner forms of parts of a backbone, which compute the same."""
