"""`python -m stablefield`: the command line, for launchers that want a module."""

from stablefield.cli import main

main()
