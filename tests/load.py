"""Many people on one backend: `python -m tests.load --clients 32 --minutes 5`.

A studio in a process of its own; clients over HTTP that generate, lay edits over, trace, knock out, stop and
reload, each with choices of its own, in two batches of equal length after a short one. Written as JSON:
results that were not what was asked for or not those of everybody else's same question, runs that the store
lost, how turns were shared, the weights before and after, the memory after each batch, how long /healthz took
throughout, and what the server's log says of bugs.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

_SERVER = """
import gc, hashlib, json, sys, psutil, torch
from studio.session import Session
from tests.browser.studio import serving
session = Session(runs=sys.argv[1], device="cpu", threads=int(sys.argv[2]))
names = {"atlas-sd": "diffusion", "atlas-clip": "clip", "atlas-llama": "language"}
def state():
    digests = {}
    for name, kind in names.items():
        digest = hashlib.sha256()
        for part, net in session.model(name, kind).components().items():
            for key, tensor in net.state_dict().items():
                digest.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        digests[name] = digest.hexdigest()
    gc.collect()
    own = psutil.Process()
    return {"weights": digests, "bytes": own.memory_info().rss, "threads": own.num_threads(),
            "running": session.queue.running is not None}
with serving(session) as address:
    print(json.dumps(address), flush=True)
    for line in sys.stdin:
        print(json.dumps(state()), flush=True)
session.close()
"""
COLOURS, OBJECTS = ("red", "blue", "green", "black"), ("star", "circle", "heart", "tree", "house")
NAMES = ("Arvonia", "Belstan", "Helmark", "Zanvonia")


@dataclass(frozen=True)
class Options:
    """How much load."""

    clients: int = 32
    """people at once"""
    minutes: float = 5.0
    """in all, both batches"""
    threads: int = 2
    """of the studio"""
    seed: int = 0
    """of every choice"""
    out: Path | None = None
    """JSON file of what was measured (default: standard output alone)"""


class Studio:
    """The server's process; asks it for its state."""

    def __init__(self, runs: Path, threads: int) -> None:
        command = [sys.executable, "-c", _SERVER, str(runs), str(threads)]
        self._log = runs.parent / "server.log"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log.open("w")}
        self._process = subprocess.Popen(command, text=True, **pipes)
        self.address = json.loads(self._process.stdout.readline())

    def state(self) -> dict[str, Any]:
        """Digests of the weights, resident bytes, threads, whether a job runs."""
        self._process.stdin.write("state\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def tracebacks(self) -> list[str]:
        """The last line of every traceback in the server's log."""
        parts = self._log.read_text().split("Traceback (most recent call last)")[1:]
        return [next(x for x in p.splitlines()[1:] if x and not x.startswith(" "))[:200] for p in parts]

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


@dataclass
class Seen:
    """What all clients saw, together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    refused: Counter = field(default_factory=Counter)
    done: Counter = field(default_factory=Counter)
    waits: dict[int, list[float]] = field(default_factory=dict)


class Person:
    """One client: asks, checks what comes back, stops, reloads."""

    def __init__(self, number: int, address: str, edit: str, seen: Seen, seed: int) -> None:
        self.number, self.address, self.edit, self.seen = number, address, edit, seen
        self.choice = random.Random(f"{seed} {number}")
        self.client = self._open()

    def _open(self) -> Any:
        from gradio_client import Client

        return Client(self.address, verbose=False, analytics_enabled=False)

    def work(self, until: float) -> None:
        """Acts until the time is over; a bug of the server is noted, not raised."""
        while time.monotonic() < until:
            try:
                self._act()
            except Exception as error:  # every refusal is looked at in the report
                with self.seen.lock:
                    self.seen.refused[f"{type(error).__name__}: {str(error)[:160]}"] += 1

    def close(self) -> None:
        """The page is closed."""
        self.client.close()

    def _act(self) -> None:
        name = self.choice.choices(["ask", "stop", "reload"], [8, 1, 1])[0]
        if name == "reload":
            self.client.close()
            self.client = self._open()
            self._count("reload")
            return
        endpoint, asked = self._question()
        if name == "stop":
            job = self.client.submit(api_name=f"/{endpoint}", **asked)
            time.sleep(self.choice.uniform(0, 1))
            job.cancel()
            self._count("stop")
            return
        started = time.monotonic()
        record, files = self.client.submit(api_name=f"/{endpoint}", **asked).result(timeout=300)
        with self.seen.lock:
            self.seen.waits.setdefault(self.number, []).append(time.monotonic() - started)
        self._check(endpoint, asked, record, files)

    def _question(self) -> tuple[str, dict[str, Any]]:
        """An endpoint and its parameters, out of few enough that many people ask the same."""
        pick, kind = self.choice.choice, self.choice.choices(range(4), [5, 3, 2, 4])[0]
        prompt = f"a {pick(COLOURS)} {pick(OBJECTS)}"
        if kind == 2:
            subject = prompt.split()[-1]
            return "trace_unet", {
                "prompt": prompt,
                "subject": subject,
                "steps": 2,
                "kinds": ["cross-attention"],
            }
        if kind == 3:
            prompt = f"The capital of {pick(NAMES)} is"
            return "knockout", {"prompt": prompt, "subject": prompt.split()[3], "controls": pick((0, 1, 2))}
        asked = {"prompt": [prompt], "steps": pick((2, 3)), "seeds": str(pick((0, 1)))}
        return "generate", asked | ({"edit": [self.edit]} if kind == 1 else {})

    def _check(self, endpoint: str, asked: dict[str, Any], record: dict, files: list) -> None:
        """The answer is that of this question, and the same as everybody's."""
        recipe = record["recipe"]
        given = {**recipe["inputs"], **recipe["params"]}
        same = recipe["method"].replace("-", "_") == endpoint and bool(recipe["edits"]) == ("edit" in asked)
        for name, value in asked.items():
            if name == "seeds":
                same &= recipe["seeds"] == [int(value)]
            elif name != "edit":
                same &= given[name] == value
        question = json.dumps([endpoint, asked], sort_keys=True)
        digest = _digest(files)
        with self.seen.lock:
            if not same:
                self.seen.wrong.append(f"person {self.number} asked {question} and got {recipe}")
            if self.seen.answers.setdefault(question, digest) != digest:
                self.seen.wrong.append(f"two answers to {question}")
            self.seen.ids.add(record["id"])
        self._count(endpoint)

    def _count(self, what: str) -> None:
        with self.seen.lock:
            self.seen.done[what] += 1
            self.seen.done[f"person {self.number}"] += 1


def _digest(files: list) -> str:
    """Of the numbers of a run, whatever the file's name."""
    paths = [f["path"] if isinstance(f, dict) else f for f in files]
    arrays = next(p for p in paths if str(p).endswith("arrays.npz"))
    digest = hashlib.sha256()
    with np.load(arrays) as stored:
        for name in sorted(stored):
            digest.update(name.encode() + stored[name].tobytes())
    return digest.hexdigest()


class Health:
    """Asks /healthz all the time; `slowest` in seconds, `missed` answers that did not come."""

    def __init__(self, address: str) -> None:
        self.address, self.slowest, self.missed, self.count = address, 0.0, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        import httpx

        with httpx.Client() as client:
            while not self._over.wait(0.5):
                started = time.monotonic()
                try:
                    well = client.get(f"{self.address}healthz", timeout=10).status_code == 200
                except httpx.HTTPError:
                    well = False
                self.missed += not well
                self.count += 1
                self.slowest = max(self.slowest, time.monotonic() - started)

    def close(self) -> None:
        """Ends it."""
        self._over.set()
        self._thread.join(15)


def _batch(people: list[Person], seconds: float) -> None:
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=p.work, args=(until,)) for p in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _edit(address: str) -> str:
    """The id of a run that made an edit, for everybody to lay over."""
    from gradio_client import Client

    client = Client(address, verbose=False, analytics_enabled=False)
    asked = {"concept": ["star"], "replacement": ["circle"], "images": False}
    record, _ = client.submit(api_name="/edit", **asked).result(timeout=300)
    client.close()
    return record["id"]


def load(options: Options) -> dict[str, Any]:
    """The report; the bars that it held."""
    from studio.store import Store

    with tempfile.TemporaryDirectory(prefix="locus-load-") as folder:
        runs = Path(folder) / "runs"
        studio, seen = Studio(runs, options.threads), Seen()
        try:
            edit = _edit(studio.address)
            people = [Person(n, studio.address, edit, seen, options.seed) for n in range(options.clients)]
            health, states = Health(studio.address), [studio.state()]
            _batch(people, options.minutes * 6)  # what is loaded and kept once is there afterwards
            for _ in range(2):
                _batch(people, options.minutes * 30)
                states.append(_quiet(studio))
            health.close()
            for person in people:
                person.close()
            store = Store(runs)
            lost = [i for i in seen.ids if store.load(i).status != "done"]
            return _report(seen, states, health, lost, options) | {"tracebacks": studio.tracebacks()}
        finally:
            studio.close()


def _quiet(studio: Studio) -> dict[str, Any]:
    """The state once nothing runs any more."""
    for _ in range(240):
        if not (state := studio.state())["running"]:
            return state
        time.sleep(0.5)
    return state


def _report(
    seen: Seen, states: list[dict], health: Health, lost: list[str], options: Options
) -> dict[str, Any]:
    people = [seen.done[f"person {n}"] for n in range(options.clients)]
    waits = [float(np.mean(w)) for w in seen.waits.values()]
    growth = states[2]["bytes"] - states[1]["bytes"]
    found = {
        "clients": options.clients,
        "minutes": options.minutes,
        "done": {k: v for k, v in seen.done.items() if not k.startswith("person")},
        "different_runs": len(seen.ids),
        "wrong": seen.wrong[:20],
        "lost": lost,
        "refused": dict(seen.refused),
        "jobs_of_one_person": [min(people), max(people)],
        "mean_wait_of_one_person_s": [round(min(waits, default=0), 2), round(max(waits, default=0), 2)],
        "healthz_slowest_s": round(health.slowest, 3),
        "healthz_missed": health.missed,
        "healthz_asked": health.count,
        "megabytes": [round(s["bytes"] / 2**20) for s in states],
        "threads": [s["threads"] for s in states],
        "growth_of_the_second_batch_mb": round(growth / 2**20, 1),
    }
    found["holds"] = {
        "no result to the wrong person": not seen.wrong,
        "no lost run": not lost and bool(seen.ids),
        "nothing refused": not seen.refused,
        "fair turns": max(waits, default=0) <= 2 * max(min(waits, default=0), 0.5),
        "weights untouched": states[0]["weights"] == states[1]["weights"] == states[2]["weights"],
        "memory flat": growth <= 0.03 * states[1]["bytes"],
        "healthz within 1 s": health.slowest <= 1.0 and not health.missed,
    }
    return found


def main(options: Options) -> int:
    """Prints the report; 1 when a bar does not hold."""
    found = load(options)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 0 if all(found["holds"].values()) and not found["tracebacks"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
