"""`python -m recap` is the `recap` command."""

from recap.cli import main

main()
