"""A user's mistake is one line on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`: exit 2 with one line on a `UserError`, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
