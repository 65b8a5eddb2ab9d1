"""What the command lines share: a user's mistake is one line and exit code 2; progress lines."""

import os
import sys
from collections.abc import Callable
from typing import TextIO

import torch

_stderr: TextIO | None = None  # the real one, once muted
_prefix = ""  # of an error's line, once muted


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


def mute(prefix: str) -> None:
    """Of several processes only one talks: this one says nothing but why it failed."""
    global _stderr, _prefix
    _stderr, _prefix = sys.stderr, prefix
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for good)


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`: exit 2 with one line on a `UserError`, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"{_prefix}error: {error}", file=_stderr or sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        sys.stderr = _stderr or sys.stderr  # for the traceback
        raise
