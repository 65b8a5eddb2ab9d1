"""errors.py: how a command line ends, and files that appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from errors import Parser, UserError, check_outputs, write_json, written_whole

ROOT = Path(__file__).parent.parent


def start(body: str, **kwargs) -> subprocess.Popen:
    """A script whose `main` is `body`, in a process of its own."""
    code = f"import sys, time, errors\ndef main():\n    {body}\nerrors.cli(main)"
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **kwargs)


def test_a_closed_pipe_is_no_error():
    with start("print('x' * 100000)") as process:
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == ""


def test_help_shows_each_default_once():
    parser = Parser(prog="x")
    parser.add_argument("--size", type=int, default=5, help="of it")
    parser.add_argument("--given", default=6, help="default: six")
    parser.add_argument("--none", help="nothing")
    parser.add_argument("--flag", action="store_true", help="switch")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    for line in ("--size SIZE of it; default: 5", "--given GIVEN default: six",
                 "--none NONE nothing", "--flag switch"):  # fmt: skip
        assert line in lines


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        Parser(prog="x").parse_args(["--absent"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "--absent" in err and err.count("\n") == 1


def test_an_error_of_the_system_is_one_line():
    with start("open('/nowhere/at/all')") as process:
        assert process.stderr.read().count("\n") == 1 and process.wait() == 2


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_processes_that_lose_another(rank, lines):
    """In the words of gloo; whose fault it was is told where it failed."""
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank)}
    error = "RuntimeError('[gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer')"
    with start(f"raise {error}", env=environment) as process:
        assert process.stderr.read().count("\n") == lines and process.wait() == 2


def test_text_that_stdout_cannot_show():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with start("print('caf\\xe9')", env=environment) as process:
        assert process.stdout.read() == "caf\\xe9\n" and process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up(number):
    restore = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 (under nohup it is ignored)
    body = "try: print(1, flush=True); time.sleep(60)\n    finally: print(2)"
    with start(body, preexec_fn=restore) as process:
        assert process.stdout.readline() == "1\n"
        process.send_signal(number)
        assert process.stdout.read() == "2\n" and process.wait() == 128 + number


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed):
    """sys.stdin and its like are None then: input() finds its end, the others say nothing."""
    code = "import sys, errors\nerrors.cli(lambda: print(sys.stdin.read(), file=sys.stderr))"
    command = ["bash", "-c", f'"$@" {closed}', "-", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, input="said", capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == {"<&-": "\n", ">&-": "said\n", "2>&-": ""}[closed]


def test_bytes_that_are_no_text():
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    settings = {"stdin": subprocess.PIPE, "text": False, "env": environment}
    with start("print(ascii(input()))", **settings) as process:
        assert process.communicate(b"caf\xe9\n")[0].strip() == b"'caf\\udce9'"


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan")})
    kept = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(UserError, match=f"cannot write {path}: No space"), written_whole(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == kept and list(tmp_path.iterdir()) == [path]


def test_outputs_are_checked(tmp_path):
    check_outputs(tmp_path / "new", None, Path(os.devnull), inputs=[None])
    os.mkfifo(tmp_path / "fifo")
    for paths, inputs in (
        ([tmp_path], []),
        ([tmp_path / "no" / "folder"], []),
        ([tmp_path / "fifo"], []),
        ([tmp_path / "a", tmp_path / "a"], []),
        ([tmp_path / "a"], [tmp_path / "." / "a"]),
    ):
        with pytest.raises(UserError, match="cannot write"):
            check_outputs(*paths, inputs=inputs)
    with pytest.raises(UserError, match="no plain file"):
        check_outputs(replaced=Path(os.devnull))
