"""What a person looks at: pages, curves, tables in the terminal."""
