"""Finished runs: reading, grouping, comparison."""
