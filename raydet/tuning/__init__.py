"""Sweeps: over recipes, and over thresholds without running the model again."""
