"""The training: from a recipe to checkpoints."""
