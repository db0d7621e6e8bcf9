"""`python -m raydet.cli`, where the command `raydet` is not on the path."""

from raydet.cli import main

main()
