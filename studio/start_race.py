"""How soon the studio answers: the server and its first image, in a process of their own: what the benchmark
calls.

Another server is started for every round and the quickest counts, since other programs disturb; the CPU
seconds that it had used by then stand beside, since they hardly change with what else runs.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from studio.diffusion_race import PROMPT, row, stated
from studio.errors import StudioError

Row = dict[str, Any]
READY_BAR = 8.0  # seconds
PATIENCE = 300.0  # seconds that a server may take


def server_start(runs: Path, threads: int, rounds: int = 3, steps: int = 20) -> list[Row]:
    """Seconds from the start of `locus serve` until /healthz answers, and until an image asked for then is
    there. runs: a folder for the server's runs."""
    found = [one_start(runs, threads, steps) for _ in range(rounds)]
    best = {name: min(f[name] for f in found) for name in found[0]}
    ready = f"process start to /healthz answering; best of {rounds}; {best['ready_cpu']:.3g} s of CPU by then"
    image = f"process start to the image of {steps} steps; asked for as soon as /healthz answers; best of "
    image += f"{rounds}; {best['image_cpu']:.3g} s of CPU by then"
    return [
        row("server ready", best["ready"], "seconds", READY_BAR, ready, least=False),
        stated("server's first image", best["image"], "seconds", image),
    ]


def one_start(runs: Path, threads: int, steps: int) -> dict[str, float]:
    """Seconds since the process was started, and of CPU, when it was ready and when its image was there."""
    import psutil

    options = ["--port", "0", "--runs", str(runs), "--threads", str(threads)]
    began = time.perf_counter()
    with started([sys.executable, "-m", "studio.cli", "serve", *options]) as process:
        watched, found = psutil.Process(process.pid), {}

        def note(name: str) -> None:
            spent = watched.cpu_times()
            found.update({name: time.perf_counter() - began, f"{name}_cpu": spent.user + spent.system})

        address = told_address(process)
        while not healthy(address):
            if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                raise StudioError(_dead(process))
            time.sleep(0.02)
        note("ready")
        draw(address, steps)
        note("image")
    return found


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process that is ended at the end of the block."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def told_address(process: subprocess.Popen) -> tuple[str, int]:
    """(host, port) from the line that the server prints; StudioError when it ends before."""
    line = process.stdout.readline()
    where = next((word for word in line.split() if word.startswith("http")), None)
    if where is None:
        process.wait(PATIENCE)
        raise StudioError(_dead(process))
    parts = urlsplit(where)
    return str(parts.hostname), int(parts.port or 80)


def _dead(process: subprocess.Popen) -> str:
    status = process.poll()
    what = f"ended with status {status}" if status is not None else f"did not answer within {PATIENCE:g} s"
    return f"The server that was to be timed {what}; run `locus serve --port 0` to see what it says."


def healthy(address: tuple[str, int]) -> bool:
    """Whether /healthz answers."""
    try:
        return ask(address, "GET", "/healthz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def ask(address: tuple[str, int], verb: str, path: str, sent: Any = None) -> tuple[int, str]:
    """(status, body) of one request; no proxy is asked."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    try:
        body = None if sent is None else json.dumps(sent)
        connection.request(verb, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def draw(address: tuple[str, int], steps: int) -> None:
    """One image through the API, waited for; StudioError when none comes."""
    status, body = ask(
        address, "POST", "/gradio_api/call/v2/generate", {"prompt": [PROMPT], "steps": steps, "seeds": [0]}
    )
    if status == 200:
        event = json.loads(body)["event_id"]
        status, body = ask(address, "GET", f"/gradio_api/call/generate/{event}")
    if status != 200 or "event: complete" not in body:
        raise StudioError(
            f"The server that was to be timed drew no image (status {status}, {body[-200:]!r}); run `locus "
            "generate` to see what is wrong."
        )
