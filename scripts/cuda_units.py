"""What check_cuda.py, time_cuda.py and tune_cuda.py share: verdicts, units of work in processes of
their own, calls as a CUDA graph."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch


def judged(what: str, limit: float, error: Callable[[], float]) -> dict:
    """One check: an error below `limit` is right. What fails to run is wrong, and says why."""
    try:
        found = error()
    except Exception as failure:  # whatever it is, the other checks go on
        reason = (str(failure).strip().splitlines() or [repr(failure)])[0]
        return {"what": f"{what}: {type(failure).__name__}: {reason}", "error": None, "ok": False}
    return {"what": what, "error": found, "ok": found < limit}


def in_a_process(script: str, unit: str, limit: float) -> list[dict]:
    """What `script --check UNIT` finds; that it fails, or takes too long, is a wrong one more."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checks.json"
        command = [sys.executable, script, "--check", unit, "--json", str(out)]
        begin, failure = time.perf_counter(), None
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=limit
            )
            if done.returncode:
                failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            failure = f"more than {limit:g} s"
        found = json.loads(out.read_text())["checks"] if out.exists() else []
        right, seconds = sum(c["ok"] for c in found), time.perf_counter() - begin
        print(f"{unit}: {right} of {len(found)} right, {seconds:.0f} s", file=sys.stderr)
        if failure:
            found.append({"what": f"{unit}: {failure}", "error": None, "ok": False})
        return found


def in_processes(script: str, units: list[str], jobs: int, limit: float) -> Iterator[list[dict]]:
    """What `in_a_process` finds of each unit, `jobs` at a time, as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed(pool.submit(in_a_process, script, unit, limit) for unit in units):
            yield done.result()


def overlaps() -> bool:
    """Whether this GPU launches a kernel while the one in front of it runs."""
    return torch.cuda.get_device_capability() >= (9, 0)


def graph_of(calls: list[Callable]) -> torch.cuda.CUDAGraph:
    """The calls, warmed up and captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
