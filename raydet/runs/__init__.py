"""Runs: what is on disk, and the names of its files."""
