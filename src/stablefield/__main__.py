"""The entry point of the command line, as `stablefield` and as `python -m stablefield`."""

import sys

from stablefield.extras import TRAIN, how_to_install


def main() -> None:
    """Run the command line; if a package of its extra is missing, print one line that says how to install it."""
    try:
        from stablefield.cli import main as command_line  # imported here, because it needs the extra

        command_line()
    except ModuleNotFoundError as error:
        if error.name not in TRAIN:
            raise
        print(f"stablefield: {how_to_install('the command line')}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
