"""What the command lines share: a mistake is one line and exit code 2; progress; writing JSON."""

import argparse
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

_stderr: TextIO | None = None  # the real one, once muted
_prefix = ""  # of an error's line, once muted


class UserError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes take one line, and whose --help shows the defaults."""

    def __init__(self, **settings):
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Adds a flag's default to its text, but for switches and where the text says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool)
        said = "default:" in action.help
        return action.help if silent or said else f"{action.help}; default: %(default)s"


def check_device(device: str) -> None:
    """A UserError, with the devices there are, if `device` is not one of them."""
    kinds = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in kinds + (["cuda"] if len(kinds) > 1 else []):
        raise UserError(f"no device {device!r} here; there is {', '.join(kinds)}")


def check_threads(threads: int | None) -> None:
    """A UserError unless there are 1 to as many as processors: far more crash OpenMP."""
    most = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= most:
        raise UserError(f"--threads {threads}: take 1 to {most}, this machine's processors")


def check_seed(seed: int) -> None:
    """A UserError for a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed {seed}: takes 64 bits")


def progress(text: str) -> None:
    """Show `text` on stderr: in place on a terminal ("" clears it), else one line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def check_outputs(
    *paths: Path | None, replaced: Path | None = None, inputs: Iterable[Path | None] = ()
) -> None:
    """A UserError, before the work begins, if a file cannot be written at one of the paths, or if
    that would overwrite another output, one of the `inputs`, or what is no plain file.

    `replaced` is an output that is renamed into its place, which /dev/null must not be.
    """
    taken = {path.resolve() for path in inputs if path}
    for path in (replaced, *paths):
        if path is None or (path == Path(os.devnull) and path != replaced):
            continue
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UserError(f"cannot write {path}: give a file in a folder that exists")
        places = (path.parent, path.resolve().parent, path)
        if not all(os.access(p, os.W_OK) for p in places if p.exists()):
            raise UserError(f"cannot write {path}: no permission")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is no plain file")
        if path.resolve() in taken:
            raise UserError(f"cannot write {path}: it is an input or another output too")
        taken.add(path.resolve())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` at the end: a failure leaves nothing."""
    target = path.resolve()  # of a link the file, not the link, is replaced
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")  # the suffix may matter
    try:
        yield partial
        if not partial.exists() and target.parent.is_dir():  # torch's traces fail in silence
            raise UserError(f"cannot write {path}: is the disk full?")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        for left in (partial, partial.with_name(f"{partial.name}.tmp")):  # torch's traces have both
            left.unlink(missing_ok=True)


@contextmanager
def directory_whole(path: Path) -> Iterator[Path]:
    """A temporary directory, which becomes the new `path` at the end: a failure leaves nothing."""
    created = [folder for folder in path.parents if not folder.exists()]  # the nearest first
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp makes it private
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # one that holds something stays
            for folder in created:
                folder.rmdir()


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE is {size!r}: torchrun sets it to a number")
    return int(size)


def first_rank() -> bool:
    """Whether this process is the only one, or the one of torchrun's that reports."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write `figures` to the file of `--json`, if one is asked for; not-a-number becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if path in (None, Path(os.devnull)) or not first_rank():
        return
    with written_whole(path) as partial:
        partial.write_text(json.dumps(plain(figures), indent=1))


def mute(prefix: str) -> None:
    """Of several processes only one talks: this one says nothing but why it failed."""
    global _stderr, _prefix
    _stderr, _prefix = sys.stderr, prefix
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for good)


def _terminate(number: int, _) -> None:
    sys.exit(128 + number)


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`: exit 2 with one line on a `UserError`, an `OSError` or a lack of
    memory, 130 on Ctrl-C. Of torchrun's processes that lose one another only the first says so.

    SIGTERM, and the end of the terminal, clean up as Ctrl-C does, but where torchrun ends processes
    that wait for each other.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if "WORLD_SIZE" not in os.environ and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    for name in ("stdin", "stdout", "stderr"):  # None where the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text that a terminal cannot show
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text
    try:
        main()
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not at exit
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"{_prefix}error: {error}", file=_stderr or sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        sys.stderr = _stderr or sys.stderr  # for the traceback
        if "gloo/transport" in str(error):  # the process that ended has said why, if it could
            if first_rank():
                print("error: lost the connection to another process", file=sys.stderr)
            sys.exit(2)
        lack = ("can't allocate memory", "out of memory")  # torch raises a RuntimeError
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in lack):
            raise
        print(f"{_prefix}error: out of memory: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)
