"""Many people on one backend: `python -m tests.load --clients 32 --minutes 5`.

A studio in a process of its own; clients over HTTP that generate, lay edits over, trace, knock out, stop and
reload, each with choices of its own, in two batches of equal length after a short one. Written as JSON:
results that were not what was asked for or not those of everybody else's same question, runs that the store
lost, how turns were shared, the weights before and after, the memory after each batch, how long /healthz took
throughout, and what the server's log says of bugs.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tyro

_SERVER = """
import gc, hashlib, json, sys, psutil, torch
from panels.server import settle
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
    return {"weights": digests, "bytes": own.memory_info().rss, "threads": own.num_threads()}
with serving(session) as address:
    state(), settle()
    print(json.dumps(address), flush=True)
    for line in sys.stdin:
        told = state() if line == "state\\n" else {"running": session.queue.running is not None}
        print(json.dumps(told), flush=True)
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
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, text=True, stderr=log, **pipes)
        self.address = json.loads(self._process.stdout.readline())

    def told(self, what: str) -> dict[str, Any]:
        """ "state": digests of the weights, resident bytes, threads; "running": whether a job runs."""
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def tracebacks(self) -> list[str]:
        """The last line of every traceback in the server's log."""
        parts = self._log.read_text().split("Traceback (most recent call last)")[1:]
        return [next(x for x in p.splitlines()[1:] if x and not x.startswith(" "))[:200] for p in parts]

    def close(self) -> None:
        """Ends it; once more does nothing."""
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@dataclass
class Seen:
    """What all clients saw, together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: dict[str, str] = field(default_factory=dict)
    ids: dict[str, tuple[dict, str]] = field(default_factory=dict)  # recipe, digest of the numbers
    wrong: list[str] = field(default_factory=list)
    refused: Counter = field(default_factory=Counter)
    done: Counter = field(default_factory=Counter)
    waits: dict[int, list[float]] = field(default_factory=dict)


class Endpoints:
    """The functions of the page's API, as a client that has read their description calls them."""

    def __init__(self, address: str) -> None:
        config = httpx.get(f"{address}config", timeout=60).json()
        info = httpx.get(f"{address}gradio_api/info", timeout=60).json()["named_endpoints"]
        known = {f"/{d['api_name']}": d["id"] for d in config["dependencies"]}
        self._known = {n.removeprefix("/"): (known[n], told["parameters"]) for n, told in info.items()}

    def body(self, endpoint: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What is posted: the number of the function and its values in their order."""
        number, parameters = self._known[endpoint]
        unknown = asked.keys() - {p["parameter_name"] for p in parameters}
        if unknown:
            raise KeyError(f"/{endpoint} has no {', '.join(unknown)}")
        values = [asked.get(p["parameter_name"], p.get("parameter_default")) for p in parameters]
        return {"fn_index": number, "data": values}


class Tab:
    """An open page, over HTTP as a browser talks: its own session, one question at a time."""

    def __init__(self, address: str, endpoints: Endpoints) -> None:
        self.api, self.endpoints = f"{address}gradio_api/", endpoints
        self.session, self.http = secrets.token_hex(8), httpx.Client(timeout=300)
        self.http.get(address).raise_for_status()

    def ask(self, endpoint: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Puts a question; what names it."""
        body = {**self.endpoints.body(endpoint, asked), "session_hash": self.session}
        answer = self.http.post(f"{self.api}queue/join", json=body)
        answer.raise_for_status()
        return {**body, "event_id": answer.json()["event_id"]}

    def answer(self, question: dict[str, Any]) -> list[Any]:
        """Waits for the values that come back. RuntimeError with what the studio says instead."""
        asked = {"session_hash": self.session}
        with self.http.stream("GET", f"{self.api}queue/data", params=asked) as stream:
            for line in stream.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("event_id") == question["event_id"] and told["msg"] == "process_completed":
                    if not told["success"]:
                        raise RuntimeError(str(told["output"].get("error"))[:300])
                    return told["output"]["data"]
        raise RuntimeError("the answers ended before this one came")

    def stop(self, question: dict[str, Any]) -> None:
        """Takes a question back."""
        named = {n: question[n] for n in ("fn_index", "session_hash", "event_id")}
        self.http.post(f"{self.api}cancel", json=named).raise_for_status()

    def file(self, url: str) -> bytes:
        """A file of an answer."""
        return self.http.get(url).raise_for_status().content

    def close(self) -> None:
        """The page is left."""
        self.http.close()


class Person:
    """One client: asks, checks what comes back, stops, reloads."""

    def __init__(
        self, number: int, address: str, endpoints: Endpoints, edit: str, seen: Seen, seed: int
    ) -> None:
        self.number, self.address, self.edit, self.seen = number, address, edit, seen
        self.choice = random.Random(f"{seed} {number}")
        self.endpoints, self.tab = endpoints, Tab(address, endpoints)

    def work(self, until: float) -> None:
        """Acts until the time is over; a bug of the server is noted, not raised."""
        while time.monotonic() < until:
            try:
                self._act()
            except Exception as error:  # every refusal is looked at in the report
                with self.seen.lock:
                    self.seen.refused[f"{type(error).__name__}: {str(error)[:160]}"] += 1

    def _act(self) -> None:
        name = self.choice.choices(["ask", "stop", "reload"], [8, 1, 1])[0]
        if name == "reload":
            self.tab.close()
            self.tab = Tab(self.address, self.endpoints)
            self._count("reload")
            return
        endpoint, asked = self._question()
        if name == "stop":
            question = self.tab.ask(endpoint, asked)
            time.sleep(self.choice.uniform(0, 1))
            self.tab.stop(question)
            self._count("stop")
            return
        started = time.monotonic()
        record, files = self.tab.answer(self.tab.ask(endpoint, asked))
        with self.seen.lock:
            self.seen.waits.setdefault(self.number, []).append(time.monotonic() - started)
        self._check(endpoint, asked, record, files)

    def _question(self) -> tuple[str, dict[str, Any]]:
        """An endpoint and its parameters. One in five is of few that many people ask, which the store answers
        a second time; the others were never asked before, and are computed."""
        pick, kind = self.choice.choice, self.choice.choices(range(4), [5, 3, 2, 4])[0]
        common = self.choice.random() < 0.2
        seed = {"seeds": str(pick((0, 1)) if common else self.choice.randrange(2, 2**31))}
        prompt = f"a {pick(COLOURS)} {pick(OBJECTS)}"
        if kind == 2:
            subject = prompt.split()[-1]
            return "trace_unet", {
                "prompt": prompt,
                "subject": subject,
                "steps": 2,
                "kinds": ["cross-attention"],
                **seed,
            }
        if kind == 3:
            prompt = f"The capital of {pick(NAMES)} is"
            return "knockout", {
                "prompt": prompt,
                "subject": prompt.split()[3],
                "controls": pick((1, 2)),
                **seed,
            }
        asked = {"prompt": [prompt], "steps": pick((2, 3)), **seed}
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
        arrays = next(f["url"] for f in files if f["orig_name"] == "arrays.npz")
        digest = _digest(self.tab.file(arrays))
        with self.seen.lock:
            if not same:
                self.seen.wrong.append(f"person {self.number} asked {question} and got {recipe}")
            if self.seen.answers.setdefault(question, digest) != digest:
                self.seen.wrong.append(f"two answers to {question}")
            self.seen.ids.setdefault(record["id"], (recipe, digest))
        self._count(endpoint)

    def _count(self, what: str) -> None:
        with self.seen.lock:
            self.seen.done[what] += 1
            self.seen.done[f"person {self.number}"] += 1


def _digest(arrays: bytes) -> str:
    """Of the numbers of a run, whatever the file's name."""
    digest = hashlib.sha256()
    with np.load(io.BytesIO(arrays)) as stored:
        for name in sorted(stored):
            digest.update(name.encode() + stored[name].tobytes())
    return digest.hexdigest()


_HEALTH = """
import json, sys, threading, time, httpx
over, slowest, missed, count = threading.Event(), 0.0, 0, 0
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
with httpx.Client() as client:
    while not over.wait(0.5):
        started = time.monotonic()
        try:
            well = client.get(sys.argv[1] + "healthz", timeout=10).status_code == 200
        except httpx.HTTPError:
            well = False
        missed, count = missed + (not well), count + 1
        slowest = max(slowest, time.monotonic() - started)
print(json.dumps({"slowest": slowest, "missed": missed, "count": count}))
"""


class Health:
    """Asks /healthz all the time, from a process of its own, so that no client's work is in the figure."""

    def __init__(self, address: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", _HEALTH, address], text=True, **pipes)

    def close(self) -> dict[str, float]:
        """Ends it: the slowest answer in seconds, how many did not come, how many were asked for."""
        return json.loads(self._process.communicate(timeout=30)[0])


def _batch(people: list[Person], seconds: float) -> None:
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=p.work, args=(until,)) for p in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _edit(tab: Tab) -> str:
    """The id of a run that made an edit, for everybody to lay over."""
    asked = {"concept": ["star"], "replacement": ["circle"], "images": False}
    record, _ = tab.answer(tab.ask("edit", asked))
    tab.close()
    return record["id"]


def load(options: Options) -> dict[str, Any]:
    """The report; the bars that it held."""
    from studio.store import Store

    with tempfile.TemporaryDirectory(prefix="locus-load-") as folder:
        runs = Path(folder) / "runs"
        studio, seen = Studio(runs, options.threads), Seen()
        try:
            where = (studio.address, Endpoints(studio.address))
            edit = _edit(Tab(*where))
            people = [Person(n, *where, edit, seen, options.seed) for n in range(options.clients)]
            health, states = Health(studio.address), [studio.told("state")]
            _batch(people, options.minutes * 6)  # what is loaded and kept once is there afterwards
            for _ in range(2):
                _batch(people, options.minutes * 30)
                states.append(_quiet(studio))
            well = health.close()
            for person in people:
                person.tab.close()
            store = Store(runs)
            lost = [i for i in seen.ids if store.load(i).status != "done"]
            told = {"tracebacks": studio.tracebacks()}
            studio.close()
            seen.wrong += _alone(seen, runs, options)
            return _report(seen, states, well, lost, options) | told
        finally:
            studio.close()


ALONE = 40  # runs that are computed again


def _alone(seen: Seen, runs: Path, options: Options) -> list[str]:
    """Which of some runs, drawn by chance, come out otherwise when nobody else is there, bit for bit."""
    from studio.session import Session
    from studio.types import Recipe

    chosen = random.Random(options.seed).sample(sorted(seen.ids.items()), min(ALONE, len(seen.ids)))
    session, wrong = Session(runs=runs, device="cpu", threads=options.threads), []
    for run_id, (told, digest) in chosen:
        names = ("method", "model", "inputs", "params")
        recipe = Recipe(*(told[n] for n in names), tuple(told["seeds"]), tuple(told["edits"]))
        arrays = session.run(recipe, fresh=True, save=False).result.arrays
        packed = io.BytesIO()
        np.savez(packed, **{name: trace.values for name, trace in arrays.items()})
        if _digest(packed.getvalue()) != digest:
            wrong.append(f"{run_id} comes out otherwise when it is alone")
    session.close()
    return wrong


def _quiet(studio: Studio) -> dict[str, Any]:
    """The state once nothing runs any more."""
    for _ in range(240):
        if not studio.told("running")["running"]:
            break
        time.sleep(0.5)
    return studio.told("state")


def _report(
    seen: Seen, states: list[dict], health: dict[str, float], lost: list[str], options: Options
) -> dict[str, Any]:
    people = [seen.done[f"person {n}"] for n in range(options.clients)]
    waits = [float(np.mean(w)) for w in seen.waits.values()]
    growth = states[2]["bytes"] - states[1]["bytes"]
    found = {
        "clients": options.clients,
        "minutes": options.minutes,
        "done": {k: v for k, v in seen.done.items() if not k.startswith("person")},
        "different_runs": len(seen.ids),
        "computed_again_alone": min(ALONE, len(seen.ids)),
        "wrong": seen.wrong[:20],
        "lost": lost,
        "refused": dict(seen.refused),
        "jobs_of_one_person": [min(people), max(people)],
        "mean_wait_of_one_person_s": [round(min(waits, default=0), 2), round(max(waits, default=0), 2)],
        "healthz_slowest_s": round(health["slowest"], 3),
        "healthz_missed": health["missed"],
        "healthz_asked": health["count"],
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
        "healthz within 1 s": health["slowest"] <= 1.0 and not health["missed"],
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
