"""Compile a model's decode step and prefill ahead of time, for `generate.py --package`.

python scripts/export.py --checkpoint_path FILE --output model.pt2
python generate.py --checkpoint_path FILE --package model.pt2

The package holds no weights, only code; it serves every checkpoint of the same shape and mode, any
prompt that fits its cache, and any sampling.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CONFIGS
from engine import Engine
from errors import Parser, UserError, check_outputs, cli, processes, progress
from graphs import configure_compiler
from loading import add_cache_argument, add_model_arguments, load, model_flags
from package import write_package
from sampling import Sampling


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Write a package of compiled steps.")
    add = parser.add_argument
    add_model_arguments(parser)
    add("--random_weights", choices=list(CONFIGS), metavar="NAME", help="true shapes, no files")
    add("--output", type=Path, default=Path("model.pt2"), metavar="FILE.pt2", help="file to write")
    add("--batch_size", type=int, default=1, help="sequences that run together")
    add("--cache_size", type=int, default=2048, help="cache slots: prompt and new tokens together")
    add_cache_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Load the model, compile its steps and write them."""
    args = parse_args()
    if min(args.batch_size, args.cache_size) < 1:
        raise UserError("--batch_size and --cache_size must be at least 1")
    check_outputs(replaced=args.output)
    if args.output.suffix != ".pt2" or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: a file in an existing folder, ending in .pt2")
    if processes() > 1:
        raise UserError("a package is for one process: leave torchrun out")
    begin = time.perf_counter()
    model, mode, _ = load(**model_flags(args))
    configure_compiler(args.device)
    settings = {"batch": args.batch_size, "length": args.cache_size, "kv_cache": args.kv_cache}
    engine = Engine(model, Sampling(temperature=0), **settings)
    write_package(engine, args.output, progress)
    progress("")
    size = args.output.stat().st_size / 1e6
    print(
        f"{args.output}: {mode}, batch {engine.batch}, {engine.slots} slots, {size:.1f} MB, "
        f"{time.perf_counter() - begin:.1f} s"
    )


if __name__ == "__main__":
    cli(main)
