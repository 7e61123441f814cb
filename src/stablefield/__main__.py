"""`python -m stablefield`: the command line, for launchers that start a module."""

from stablefield.cli import main

__all__: list[str] = []

main()
