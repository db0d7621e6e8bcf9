"""Detection in pictures, and what is written of it."""
