"""Finished runs: read from their folders, grouped, compared."""
