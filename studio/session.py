"""Session: the loaded models under a memory budget, the store and the queue. run(recipe) is where a recipe
becomes a run.

Look in the store, else queue, load, overlay edits, seed, run, undo, save: the same for a button, a command
and a test.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from studio.audit import Stack
from studio.edit_files import Shelf, mark
from studio.edits import Composer, overlay
from studio.errors import Cancelled, RequestError, StudioError
from studio.jobs import Job, JobQueue
from studio.models.catalog import DEFAULT_SCORER
from studio.models.device import RowMemory, default_threads, free_memory, pick_device, release, set_precision
from studio.models.hub import Hub
from studio.models.loaded import check_dtype, check_memory, load
from studio.models.loading import Source, home, locate
from studio.models.parking import Parking
from studio.models.precision import computed_in, held_as
from studio.provenance import files_read, laid, origin, versions, with_warnings
from studio.registry import Method, find_method, parse, plain
from studio.rescue import saved, tried
from studio.store import Store, write_run
from studio.types import Recipe, Result, Run

_log = logging.getLogger("locus")
_KINDS = {"diffusion": "a text-to-image model", "clip": "a CLIP", "language": "a language model"}
_KINDS |= {"vision": "a vision transformer"}


class Session:
    """One backend: models on one device, one queue in front of them, one store behind.

    device: auto (CUDA, then MPS, then CPU), cpu, cuda or mps. dtype: auto is float32; what halves are used
    for models/precision.py says; int8 and int4 are for the weights of language models. threads: of torch on
    the CPU.
    memory: bytes that loaded models may take (default: 70 % of what is free at the start); those of one run
    stay together, also above that. batch: rows of one forward.
    """

    def __init__(
        self,
        *,
        runs: str | Path | None = None,
        models: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        memory: int | None = None,
        batch: int | None = None,
        compile: bool = False,
    ) -> None:
        self.device = pick_device(device)
        set_precision(self.device)
        self.dtype = check_dtype(dtype, self.device)
        if threads is not None and not 1 <= threads <= 1024:
            raise RequestError(f"--threads must be from 1 to 1024, not {threads}.")
        self.threads = threads or default_threads()
        self.batch, self._given = batch or (16 if self.device == "cpu" else 64), batch is not None
        self.row_memory = RowMemory(self.device)
        self.models_folder = Path(models).expanduser() if models else None
        self.hub = Hub()
        self.store = Store(runs or home() / "runs")
        self._memory = memory
        self._loaded: OrderedDict[tuple, Any] = OrderedDict()
        self.parking, self._compile = Parking(self.device), compile
        self.shelf, self._composer = Shelf(), Composer()
        self.queue = JobQueue(self._execute)

    # ---- asking -------------------------------------------------------------------------------------------

    def submit(
        self,
        recipe: Recipe,
        *,
        user: str = "local",
        fresh: bool = False,
        out: Path | None = None,
        save: bool = True,
        force: bool = False,
    ) -> Job:
        """Checks a recipe and queues it. RequestError comes at once, before anything is queued or written."""
        recipe = self.checked(recipe)
        return self.queue.submit(recipe, user, fresh=fresh, out=out, save=save, force=force)

    def run(self, recipe: Recipe, report: Callable[[Job], None] | None = None, **options: Any) -> Run:
        """Runs a recipe and waits for it; `report(job)` is called at every change. Raises what the job
        raised.

        KeyboardInterrupt cancels the job, waits until the device is free, and goes on up.
        """
        job = self.submit(recipe, **options)
        seen = -1
        try:
            while not job.over:
                seen = job.wait(seen, 0.5)
                if report:
                    report(job)
        except KeyboardInterrupt as stop:
            job.cancel()
            while not job.over:
                job.wait(job.version, 0.5)
            stop.partial = None if job.options.get("out") else job.run
            raise
        if job.error:
            raise job.error
        return job.run

    def call(
        self, model: str, what: Callable[[Any], Any], *, user: str = "local", kind: str = "diffusion"
    ) -> Any:
        """what(model) on the device, in turn with all jobs: to read a model of a kind, never to change it.
        Raises what it raised."""
        job = self.queue.submit(Recipe("", model), user, call=what, kind=kind)
        while not job.over:
            job.wait(job.version, 0.5)
        self.queue.forget(job)
        if job.error:
            raise job.error
        return job.run

    def cross_attention_layers(self, name: str) -> tuple[str, ...]:
        """Names of a text-to-image model's cross-attention layers in execution order, from its
        configuration alone."""
        from studio.models.sites import cross_attention_names

        source = locate(name, self.models_folder, self.hub)
        if source.kind != "diffusion":
            raise RequestError(f"{name} is no text-to-image model, so it has no cross-attention layers.")
        return cross_attention_names(source.configuration)

    def checked(self, recipe: Recipe) -> Recipe:
        """The recipe with every default filled in, or RequestError."""
        method = find_method(recipe.method)
        inputs, params, seeds = parse(
            method, {**recipe.inputs, **recipe.params}, recipe.seeds if method.samples else None
        )
        if method.lays_edits and not recipe.edits:
            raise RequestError(f"{method.name} needs --edit: the edit file to look at.")
        if method.complete:
            inputs = method.complete(inputs, Stack(tuple(self.shelf.open(e) for e in recipe.edits)))
        if method.check:
            method.check(inputs, params, seeds)
        if recipe.edits and method.saves:
            raise RequestError(
                f"{method.name} starts from the model's own weights, so it takes no --edit; use its file "
                "together with others afterwards."
            )
        for entry in recipe.edits:
            self.shelf.open(entry)
        return replace(recipe, inputs=plain(inputs), params=plain(params), seeds=seeds)

    def close(self) -> None:
        """Ends the worker and lets the models go."""
        self.queue.close()
        self._loaded.clear()
        self.parking.drop()

    # ---- models -------------------------------------------------------------------------------------------

    def model(self, name: str, kind: str, dtype: str | None = None) -> Any:
        """A loaded model by name, from memory or from disk; the least recently used make room. `dtype`: in
        place of the session's."""
        source, dtype = self.source(name, kind), held_as(kind, dtype or self.dtype)
        key = (str(source.path.resolve()), source.fingerprint, dtype, kind)
        self.parking.use(key)
        if key not in self._loaded:
            self._make_room(source, dtype)
            waits = key in self.parking
            self._loaded[key] = self.parking.fetch(key) if waits else load(source, kind, self.device, dtype)
            if self._compile and kind == "diffusion" and not waits:
                self._loaded[key].compile()
        model = self._loaded[key]
        self._loaded[key] = self._loaded.pop(key, model)  # the last one used; another thread may let it go
        return model

    def source(self, name: str, kind: str) -> Source:
        """Where a model of this kind is, before anything is loaded; RequestError when there is none."""
        source = locate(name, self.models_folder, self.hub)
        if source.kind != kind and (kind, source.kind) != ("vision", "clip"):
            want = _KINDS.get(kind, kind)
            own = _KINDS.get(source.kind, "") if source.kind != "language" else ""
            own = own or f"a {source.family or source.kind} model"
            raise RequestError(f"{name} is {own}, and {want} is needed here; see `locus models`.")
        return source

    def loaded(self) -> list[tuple[str, int]]:
        """(name, bytes) of the models in memory, least recently used first."""
        return [(m.id, m.nbytes()) for m in list(self._loaded.values())]

    def unload(self, name: str) -> bool:
        """Lets a model go; False when it wasn't loaded."""
        keys = [k for k, m in list(self._loaded.items()) if m.id == name]
        gone = [self._loaded.pop(key, None) for key in keys]
        del gone
        waited = self.parking.drop(keep=lambda model: model.id != name)
        release(self.device)
        return bool(keys or waited)

    def budget(self) -> int:
        """Bytes that models may take in all."""
        if self._memory is not None:
            return self._memory
        return int(0.7 * (free_memory(self.device) + sum(b for _, b in self.loaded())))

    def load(self, name: str, kind: str, *, user: str = "local") -> Job:
        """A job that loads a model in turn and keeps it, so that the next run starts at once."""
        return self.queue.submit(Recipe("", name), user, call=lambda model: None, kind=kind)

    def _make_room(self, source: Source, dtype: str) -> None:
        budget = self.budget()
        need = check_memory(source, dtype, budget, self.device)
        self.parking.make_room(self._loaded, source.name, need, budget)

    def _scorer(self, params: Any, model: Any, job: Job) -> Any:
        if hasattr(params, "clip"):
            return self.model(params.clip, "clip") if params.clip else None
        metric = getattr(params, "metric", None)
        if not getattr(params, "scored", metric not in (None, "distance")):
            return None
        name = params.scorer or model.source.defaults.get("scorer")
        if name is None and model.source.kind == "diffusion":
            name = "atlas-clip" if (model.source.path.name.startswith("atlas")) else DEFAULT_SCORER
        scorer = self.model(name, "clip")
        if scorer.shares_text_encoder(model):
            job.warn(
                f"The scorer {scorer.id} shares its text encoder with the generator, so its scores are "
                f"not independent."
            )
        return scorer

    def _with_extras(self, method: Method, model: Any, params: Any, job: Job) -> tuple[Method, str]:
        """The method with what it declares beside the usual arguments; the second scorer's fingerprint."""
        from studio.atlas.reading import second_scorer

        extras, second = {}, None
        if method.lays_edits:
            active = tuple(self.shelf.open(entry) for entry in job.recipe.edits)
            extras["edits"] = Stack(active, bool(job.options.get("force")), self._composer)
        if hasattr(params, "second_scorer"):
            extras["second_scorer"] = second = second_scorer(params.second_scorer, model, self.model)
        wired = replace(method, run=partial(method.run, **extras)) if extras else method
        return wired, second.fingerprint if second else ""

    # ---- running (in the worker's thread) -----------------------------------------------------------------

    def _execute(self, job: Job) -> Run:
        import torch

        torch.set_num_threads(self.threads)
        with self.parking.job():
            if "call" in job.options:
                return job.options["call"](self.model(job.recipe.model, job.options["kind"]))
            recipe, method = job.recipe, find_method(job.recipe.method)
            inputs, params, seeds = parse(
                method, {**recipe.inputs, **recipe.params}, recipe.seeds if method.samples else None
            )
            job.plan(0, "loading the model")
            dtype, why = computed_in(method, self.dtype)
            if why:
                job.warn(why)
            model = self._model_for(method, recipe.model, dtype)
            scorer = self._scorer(params, model, job)
            method, second = self._with_extras(method, model, params, job)
            key = recipe.key(
                model.fingerprint,
                dtype,
                tuple(mark(self.shelf.open(entry)) for entry in recipe.edits),
                (scorer.fingerprint if scorer else "") + second + files_read(inputs, params) or None,
            )
            anew = job.options.get("fresh") or job.options.get("out") is not None
            if not anew and (found := self.store.find(key, own=True)):
                return found
            run, failure = self._attempt(method, (model, inputs, params, seeds, scorer), job)
            run = self._keep(replace(run, key=key, model=origin(model, recipe.model)), method, job)
            if failure is not None:
                failure.partial = run
                raise failure
            return run

    def _model_for(self, method: Method, name: str, dtype: str) -> Any:
        model = self.model(name, method.family, dtype)
        if missing := method.needs - model.provides:
            raise RequestError(
                f"{method.name} needs a model with {', '.join(sorted(missing)).replace('_', '-')}; "
                f"{model.id} has none."
            )
        return model

    def _attempt(self, method: Method, arguments: tuple, job: Job) -> tuple[Run, Exception | None]:
        """(the run, what ended it early or None); an end before the first partial result is raised."""
        tried(self.store, job.options)
        started, clock, rows = datetime.now(UTC), time.monotonic(), self.batch
        edits = [self.shelf.open(entry) for entry in (() if method.lays_edits else job.recipe.edits)]
        forced = bool(job.options.get("force"))
        result, failure = None, None
        try:
            with overlay(arguments[0], edits, force=forced, composer=self._composer):
                result, rows = self._with_less_memory(method, arguments, job)
        except Exception as error:  # raised again once what was measured is kept
            failure = error
            if job.latest is None:
                raise
        run = Run(
            job.recipe,
            "done" if failure is None else "stopped" if isinstance(failure, Cancelled) else "failed",
            started.isoformat(timespec="seconds"),
            time.monotonic() - clock,
            self.host(rows, computed_in(method, self.dtype)[0]) | laid(job, arguments[-1]),
            with_warnings(result or job.latest, job.warnings),
            str(failure) or None if failure else None,
        )
        return run, failure

    def _with_less_memory(self, method: Method, arguments: tuple, job: Job) -> tuple[Result, int]:
        """Runs the method; out of memory halves the rows of a forward until it fits."""
        import torch

        job.rows = 0  # not known yet
        while True:
            try:
                torch.manual_seed(0)
                job.rows = job.rows or self._rows(arguments[0], arguments[2])
                return method.run(*arguments, job), job.rows
            except (torch.OutOfMemoryError, MemoryError) as error:
                reason = str(error)
            except RuntimeError as error:
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                reason = str(error)
            if self.device == "cuda":
                torch.cuda.empty_cache()
            if job.rows <= 1:
                raise StudioError(
                    f"There is not enough memory for one image at a time on {self.device} "
                    f"({' '.join(reason.split())[:80]}); take a smaller size or model."
                )
            job.rows = max(1, job.rows // 2)
            job.warn(f"Memory ran out; the batch was halved to {job.rows} rows.")

    def _rows(self, model: Any, params: Any) -> int:
        """Rows of one forward: those asked for, else as many as fit, by what one row takes."""
        one_row = getattr(model, "one_row", None)
        if self._given or one_row is None:
            return self.batch
        size = tuple(getattr(params, n, None) for n in ("height", "width"))
        key = (model.fingerprint, str(model.dtype), size)
        return self.row_memory.rows(key, lambda: one_row(params), self.batch)

    def _keep(self, run: Run, method: Method, job: Job) -> Run:
        """The run once it is written; a figure that can't be drawn, or an --out that fails, never costs the
        run."""
        try:
            return self._write(run, method.draw(run), job)
        except (StudioError, OSError):
            raise
        except Exception as error:  # a bug in drawing: the numbers are worth more than the picture
            _log.exception("the figure of %s could not be drawn", run.recipe.method)
            job.warn(f"The figure could not be drawn ({type(error).__name__}); numbers and images are kept.")
            return self._write(replace(run, result=with_warnings(run.result, job.warnings)), None, job)

    def _write(self, run: Run, figure: Any, job: Job) -> Run:
        out = job.options.get("out")
        if out is None:
            return saved(self.store, run, figure) if job.options.get("save", True) else run
        if run.status == "stopped":
            return run
        try:
            write_run(replace(run, id=out.name), out, figure)
        except (StudioError, FileExistsError) as error:
            reason = "it came into being meanwhile" if isinstance(error, FileExistsError) else str(error)
            kept = saved(self.store, run, figure)
            raise StudioError(
                f"{out} could not be written ({reason}); the run is kept as {self.store.root / kept.id}."
            ) from error
        return replace(run, id=out.name)

    def host(self, rows: int, dtype: str | None = None) -> dict[str, Any]:
        """What a replay needs to repeat the same bits. `dtype`: in place of the session's."""
        return {
            "device": self.device,
            "dtype": dtype or self.dtype,
            "threads": self.threads,
            "batch": rows,
            "versions": versions(),
            "machine": platform.machine(),
        }
