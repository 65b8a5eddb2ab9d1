"""What the command lines share: a user's mistake is one line and exit code 2; progress lines."""

import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do."""


def check_device(device: str) -> None:
    """A UserError, with the devices there are, if `device` is not one of them."""
    kinds = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in kinds + (["cuda"] if len(kinds) > 1 else []):
        raise UserError(f"no device {device!r} here; there is {', '.join(kinds)}")


def progress(text: str) -> None:
    """Show `text` on stderr: in place on a terminal ("" clears it), else one line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`: exit 2 with one line on a `UserError`, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
