"""The rows of bench.py's table in the making: checkpoints of the modes, flags that run them."""

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint import Checkpoint, open_checkpoint
from errors import UserError, progress, write_json
from modes import FLOAT_MODES, Mode, head_mode, mode_names, parse_grouped, parse_mode
from quantize import default_output

HERE = Path(__file__).parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json",
                   "generation_config.json", "chat_template.jinja")  # fmt: skip
DEFAULT_MODES = "bf16,int8,int8dq,int4,int4-gptq"


@dataclass
class Entry:
    """One row in the making: a mode's name, the flags that load it, and what its turns measured."""

    mode: str
    flags: list[str]
    turns: list[dict] = field(default_factory=list)
    perplexity: float | None = None
    failure: str | None = None  # why there will be no row


def run_script(script: str, flags: list[str], limit: float | None = None) -> dict:
    """Run a script of this project in a process of its own; returns what its --json wrote.

    UserError where it fails, or takes more than `limit` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / script), *flags, "--json", str(figures)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                errors="replace", timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"{script} {' '.join(flags)}: took more than {limit:g} s") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{script} {' '.join(flags)}: {last.removeprefix('error: ')}")
        return json.loads(figures.read_text())


def read_modes(names: list[str], groupsize: int | None) -> list[Mode | Path]:
    """Modes, `mode:groupsize`, or paths of checkpoint files, checked before anything runs.

    `groupsize` is for the modes that have groups and name no size of their own.
    """
    parsed: list[Mode | Path] = []
    for name in names:
        if name.endswith(".safetensors"):
            parsed.append(Path(name))
            continue
        mode = parse_grouped(name)
        if ":" not in name and mode.groupsize is not None:
            mode = parse_mode(name, groupsize)
        parsed.append(mode)
    return parsed


def label(mode: Mode) -> str:
    """int4-gptq.g64"""
    return f"{mode}.g{mode.groupsize}" if mode.groupsize else str(mode)


def group_flags(mode: Mode) -> list[str]:
    """The flag that asks for the mode's group size; 0 is one scale per row."""
    return [] if mode.groupsize is None else ["--groupsize", str(mode.groupsize)]


def entry_of_file(path: Path) -> Entry:
    """A row for a checkpoint that is there already."""
    header = open_checkpoint(path).header
    group = f".g{header['groupsize']}" if header.get("groupsize") else ""
    return Entry(f"{header.get('mode', path.stem)}{group}", ["--checkpoint_path", str(path)])


def random_entry(mode: Mode, name: str) -> Entry:
    """A row of random weights of true shape, quantized on load layer by layer."""
    flags = ["--random_weights", name]
    if mode.format in FLOAT_MODES:
        return Entry(label(mode), [*flags, "--precision", mode.format])
    return Entry(label(mode), [*flags, "--quantization", str(mode), *group_flags(mode)])


def quantized_file(source: Checkpoint, mode: Mode, folder: Path, device: str) -> Path:
    """A checkpoint of that mode, written into `folder` with quantize.py's defaults.

    What an earlier run wrote there is taken, if it was made of this source, and by this code, as
    they are now.
    """
    name = default_output(source, mode).name
    made_from = {"path": str(source.path.resolve()), "modified": modified(source)}
    note = folder / f"{name}.source.json"  # whose a file in `folder` is
    want = (str(mode), mode.groupsize, str(head_mode(mode, None)))
    known = note.exists() and json.loads(note.read_text()) == made_from
    known = known and note.stat().st_mtime > code_modified()
    path = folder / name
    if known and path.exists():
        header = open_checkpoint(path).header
        if tuple(header.get(k) for k in ("mode", "groupsize", "lm_head")) == want:
            progress(f"{label(mode)}: {path} is there already")
            return path
    progress(f"{label(mode)}: quantizing ...")
    for file in TOKENIZER_FILES:  # a checkpoint's tokenizer is looked for beside it
        there, here = source.directory / file, folder / file
        if not there.exists() or folder.samefile(source.directory):
            continue
        if here.exists() and not filecmp.cmp(there, here, shallow=False):
            raise UserError(f"--work_dir {folder} holds another model's {file}")
        shutil.copy(there, here)
    flags = ["--mode", str(mode), *group_flags(mode), "--checkpoint_path", str(source.path)]
    run_script("quantize.py", [*flags, "--output", str(path), "--device", device])
    write_json(note, made_from)
    return path


def modified(checkpoint: Checkpoint) -> float:
    """When its newest file was written, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in set(checkpoint.files.values()))


def code_modified() -> float:
    """When the newest source file of the project was written, tests and scripts left out."""
    kernels = [p for p in (HERE / "kernels").rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    return max(path.stat().st_mtime for path in [*HERE.glob("*.py"), *kernels])


def checkpoint_entry(source: Checkpoint, mode: Mode, folder: Path, device: str) -> Entry:
    """A row for a mode of a source checkpoint."""
    if mode.format in FLOAT_MODES:
        flags = ["--checkpoint_path", str(source.path), "--precision", mode.format]
        return Entry(label(mode), flags)
    path = quantized_file(source, mode, folder, device)
    return Entry(label(mode), ["--checkpoint_path", str(path)])


def make_entries(args: argparse.Namespace, folder: Path) -> list[Entry]:
    """The rows that the command line asks for, with their checkpoints made."""
    names = mode_names() if args.modes == "all" else args.modes.split(",")
    modes = read_modes([name.strip() for name in names if name.strip()], args.groupsize)
    if not modes:
        raise UserError(f"--modes {args.modes!r} names no mode")
    if args.random_weights and args.modes in ("all", DEFAULT_MODES):
        modes = [mode for mode in modes if not mode.needs_checkpoint]
    files = [entry_of_file(mode) for mode in modes if isinstance(mode, Path)]
    if args.random_weights:
        if files:
            raise UserError("--random_weights has no checkpoint files: leave them out of --modes")
        if unfit := [str(mode) for mode in modes if mode.needs_checkpoint]:
            raise UserError(f"random weights cannot be calibrated: leave out {', '.join(unfit)}")
        return [random_entry(mode, args.random_weights) for mode in modes]
    source = open_checkpoint(args.checkpoint_path)
    if source.header:
        raise UserError(f"{source.path} is quantized already: give the source model's directory")
    if args.text and args.seq_length > source.config.max_positions:
        limit = source.config.max_positions
        raise UserError(f"--seq_length {args.seq_length}: the model's context is {limit}")
    return [
        files.pop(0) if isinstance(mode, Path)
        else checkpoint_entry(source, mode, folder, args.device)
        for mode in modes
    ]  # fmt: skip
