"""Attention knockout: what the answer loses when tokens can't be attended to in a window of layers.

The score of an edge (source <- blocked token) is minus infinity in every head of the layers
[max(0, l - w//2), min(L, l + ceil(w/2))). Dissecting Factual Associations, arXiv 2304.14767; in prompts with
a context, arXiv 2406.12824. Only the suffix that a cut can change is computed (models/suffix_runs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.methods.language_prompt import (
    GROUPS,
    Answer,
    Asked,
    check_groups,
    exchanged,
    percent,
    pick_answer,
    token_groups,
)
from studio.registry import knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

MOST_LOGITS = 2**25  # numbers of one piece of logits
MOST_CURVES = 6  # groups that are drawn as curves; more are drawn as a heat map
MOST_ROWS = 40  # groups of a heat map; of more those with the strongest change

Readings = np.ndarray  # (3, sets, layers): probability of the answer, its rank, the top token


@dataclass(frozen=True, kw_only=True)
class Inputs(Asked):
    """The prompt, and which of its parts are cut off."""

    groups: tuple[str, ...] | None = knob(
        None,
        "what is cut off; default subject, attribute, context, question and last, as far as they are given. "
        "sentences cuts each sentence of the context by itself, tokens each token",
        choices=GROUPS,
    )
    counterfactual: str | None = knob(
        None, "a text in the attribute's place, of as many tokens: its states are patched in, layer by layer"
    )


@dataclass(frozen=True, kw_only=True)
class Params:
    """How attention is cut."""

    window: int = knob(9, "layers that are cut together, around each layer", unit="layers", low=1, high=1024)
    sources: str = knob(
        "last",
        "which tokens can't see the group: the last one, or every later token outside the group (information "
        "can be routed through others)",
        choices=("last", "later"),
    )
    controls: int = knob(
        5, "random sets of the same size beside each group, drawn for each seed", unit="sets", low=0, high=100
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    check_groups(inputs, inputs.groups)
    if inputs.counterfactual is not None and inputs.attribute is None:
        raise RequestError("--counterfactual needs --attribute: the text that it takes the place of.")


def layer_window(layer: int, width: int, depth: int) -> tuple[int, int]:
    """The layers [max(0, l - w//2), min(L, l + ceil(w/2))) as (first, end)."""
    return max(0, layer - width // 2), min(depth, layer + -(-width // 2))


def strongest_rows(change: np.ndarray) -> list[int]:
    """Rows of changes (groups, layers) that a heat map shows, ascending: all, or of many the MOST_ROWS with
    the strongest change in any layer. What isn't measured yet counts as none."""
    strongest = np.abs(np.nan_to_num(change)).max(1)
    return sorted(np.argsort(-strongest, kind="stable")[:MOST_ROWS].tolist())


def draw(run: Run) -> Figure:
    """Curves of the relative change by layer, with the range of the random sets shaded; a heat map for many
    groups."""
    change = run.result.arrays["relative_change"]
    groups, layers = change.axis("group").labels, change.axis("layer").labels
    values, inputs = run.result.values, run.recipe.inputs
    title = f"{run.recipe.model}: {values['answer']!r} after “{str(inputs['prompt'])[-60:]}”"
    sources = "the last token" if values["sources"] == "last" else "later tokens"
    caption = f"{sources} can't see the group in {values['window']} layers around each. {values['finding']}"
    if len(groups) > MOST_CURVES:
        rows = strongest_rows(change.values)
        drawn = {"rows": [groups[g] for g in rows], "values": change.values[rows]}
        data = drawn | {"cols": layers, "unit": "relative change"}
        caption = caption if len(rows) == len(groups) else f"{len(rows)} of {len(groups)} groups. {caption}"
        titles = {"row_title": "tokens cut off", "col_title": "layer (centre of the window)"}
        return Figure("heat", data | titles, title, caption)
    control = run.result.arrays.get("control")
    series = []
    for g, group in enumerate(groups):
        one = {"name": group, "x": range(len(layers)), "y": change.values[g], "labels": [""] * len(layers)}
        band = {}
        if control is not None and np.isfinite(control.values[:, :, g]).any():
            draws = control.values[:, :, g].reshape(-1, len(layers))
            band = {"low": np.nanmin(draws, 0), "high": np.nanmax(draws, 0)}
        series.append(one | band | {"line": True})
    axes = {"x_title": "layer (centre of the window)", "y_title": "relative change of the probability"}
    axes["whole"] = True
    return Figure("curve", {"series": series, **axes}, title, caption)


@method(
    "knockout",
    title="Attention knockout",
    paper="arXiv:2304.14767",
    family="language",
    summary="What the answer loses when the last token can't attend to parts of the prompt.",
    needs={"language"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
)
def attention_knockout(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`probability` (), `knocked_out`, `relative_change`, `rank` and `top_token` (group, layer), `control`
    (seed, draw, group, layer), `groups` (group, token), with a counterfactual `patched` and
    `patched_counterfactual` (place, layer)."""
    import torch

    from studio.models.attention_interface import attention_interface

    with torch.no_grad(), attention_interface(model):
        work = _Knockout(model, inputs, params, seeds, report)
        work.cut_groups()
        work.patch()
        work.cut_controls()
    return work.result()


class _Knockout:
    """What is measured so far; what isn't yet is NaN."""

    def __init__(
        self, model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], report: Report
    ) -> None:
        from studio.models.suffix_runs import clean_run

        self.model, self.inputs, self.params, self.seeds, self.report = model, inputs, params, seeds, report
        self.prompt = model.encode(inputs.prompt, inputs.context)
        self.sets = token_groups(model, self.prompt, inputs, inputs.groups)
        self.depth, self.length = len(model.blocks), len(self.prompt)
        if inputs.counterfactual is not None:
            self.other, self.differ = exchanged(model, self.prompt, inputs, inputs.counterfactual)
        self.clean = clean_run(model, self.prompt.ids)
        self.answer: Answer = pick_answer(model, self.clean.logits, inputs, report)
        self.windows = [layer_window(i, params.window, self.depth) for i in range(self.depth)]
        self.found = np.full((3, len(self.sets), self.depth), np.nan)
        self.control = np.full((len(seeds), params.controls, len(self.sets), self.depth), np.nan)
        self.patched: dict[str, Readings] = {}
        total = len(self.sets) * (1 + len(seeds) * params.controls)
        report.plan(total, "cutting attention")

    # ---- cuts -------------------------------------------------------------------------------------------

    def cut_groups(self) -> None:
        """The groups themselves."""
        self._cut_all(list(self.sets.values()), self._keep_group)

    def _keep_group(self, first: int, readings: Readings) -> None:
        self.found[:, first : first + readings.shape[1]] = readings
        self.report.partial(self.result())

    def cut_controls(self) -> None:
        """Random sets of the same size: no special token, not the first, not the last, none of the group."""
        import torch

        sets, places = [], []
        for s, seed in enumerate(self.seeds):
            source = torch.Generator().manual_seed(seed)
            for d in range(self.params.controls):
                for g, group in enumerate(self.sets.values()):
                    barred = {0, self.length - 1, *self.prompt.special, *group}
                    rest = [t for t in range(self.length) if t not in barred]
                    order = torch.randperm(len(rest), generator=source).tolist()
                    if len(rest) >= len(group):
                        sets.append(tuple(sorted(rest[i] for i in order[: len(group)])))
                        places.append((s, d, g))
        large = sorted(set(range(len(self.sets))) - {g for _, _, g in places})
        if self.params.controls and large:
            names = ", ".join(list(self.sets)[g] for g in large[:4])
            self.report.warn(f"Too few other tokens for random sets as large as {names}; these have none.")

        def keep(first: int, readings: Readings) -> None:
            for i, probability in enumerate(readings[0], first):
                self.control[places[i]] = probability / self.answer.probability - 1

        self._cut_all(sets, keep)

    def _cut_all(self, sets: Sequence[tuple[int, ...]], keep: Any) -> None:
        """Measures each set and hands the readings of some to keep(index of the first, readings)."""
        if self.params.sources == "later":
            for i, group in enumerate(sets):
                keep(i, self._cut([group], min(min(group) + 1, self.length - 1)))
                self.report.step()
            return
        size = max(1, self.report.rows * self.length // len(set(self.windows)))
        for i in range(0, len(sets), size):
            keep(i, self._cut(sets[i : i + size], self.length - 1))
            self.report.step(len(sets[i : i + size]))

    def _cut(self, sets: Sequence[tuple[int, ...]], start: int) -> Readings:
        """Readings (3, sets, layers) with each set cut off, from the suffix that begins at `start`."""
        import torch

        from studio.models.suffix_runs import Suffix, cut_windows

        suffix = Suffix(self.clean, start)
        cuts = torch.zeros(len(sets), suffix.n, self.length, dtype=torch.bool, device=self.model.device)
        for row, group in zip(cuts, sets, strict=True):
            row[:, list(group)] = True
            if self.params.sources == "later":  # edges from later tokens that are not of the group
                row &= torch.ones_like(row).tril(start - 1)
                row[[t - start for t in group if t >= start]] = False
        room = max(1, self.report.rows * self.length // suffix.n // len(sets))
        parts = []
        for i in range(0, self.depth, room):
            states = cut_windows(suffix, cuts, self.windows[i : i + room])
            parts.append(self._read(suffix, torch.cat(states)).reshape(3, len(states), len(sets)))
        return np.concatenate(parts, 1).transpose(0, 2, 1)

    def _read(self, suffix: Any, states: Any, token: int | None = None) -> Readings:
        """Probability and rank of the answer (or of `token`) and the top token, (3, streams)."""
        token, parts = self.answer.id if token is None else token, []
        for piece in states.split(max(1, MOST_LOGITS // len(self.clean.logits))):
            logits = suffix.logits(piece)
            mine = logits[:, token]
            probability = (mine - logits.logsumexp(-1)).exp()
            rank = (logits > mine[:, None]).sum(-1) + 1
            parts += [np.stack([v.double().cpu().numpy() for v in (probability, rank, logits.argmax(-1))])]
        return np.concatenate(parts, -1)

    # ---- the counterfactual -----------------------------------------------------------------------------

    def patch(self) -> None:
        """States of the prompt with the attribute exchanged, patched in after each layer."""
        from studio.models.suffix_runs import Suffix, clean_run, patched_layers

        if self.inputs.counterfactual is None:
            return
        other = clean_run(self.model, self.other.ids)
        ranked = other.logits.argsort(descending=True).tolist()
        self.turned = next(t for t in ranked if not self.model.is_blank(t))
        self.turned_probability = [float(other.logits.softmax(-1)[t]) for t in (self.answer.id, self.turned)]
        places = {"attribute": self.differ, "last": (self.length - 1,)}
        if self.prompt.context_span:
            context = self.model.span_tokens(self.prompt, self.prompt.context_span)
            places["context"] = tuple(sorted({*self.differ, *(t for t in context if t > self.differ[0])}))
        for name, tokens in places.items():
            suffix, parts = Suffix(self.clean, tokens[0]), []
            room = max(1, self.report.rows * self.length // suffix.n)
            states = [other.after(i)[list(tokens)] for i in range(self.depth)]
            at = [t - tokens[0] for t in tokens]
            for i in range(0, self.depth, room):
                layers = range(i, min(i + room, self.depth))
                last = patched_layers(suffix, states, at, layers)
                parts.append([self._read(suffix, last, t)[0] for t in (self.answer.id, self.turned)])
            self.patched[name] = np.concatenate(parts, -1)
            self.report.partial(self.result())

    # ---- result -----------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Everything that is measured."""
        p, group = self.answer.probability, Axis("group", tuple(self.sets))
        layer = Axis("layer", tuple(map(str, range(self.depth))))
        knocked, rank, top = (values.astype(np.float32) for values in self.found)
        change = ((self.found[0] - p) / p).astype(np.float32)
        member = np.zeros((len(self.sets), self.length), np.float32)
        for row, tokens in zip(member, self.sets.values(), strict=True):
            row[list(tokens)] = 1
        arrays = {
            "probability": Trace(np.float32(p), (), "probability of the answer"),
            "knocked_out": Trace(knocked, (group, layer), "probability of the answer", p),
            "relative_change": Trace(change, (group, layer), "relative change of the probability"),
            "rank": Trace(rank, (group, layer), "rank of the answer, 1 is the most probable"),
            "top_token": Trace(top, (group, layer), "id of the most probable token"),
            "groups": Trace(member, (group, Axis("token", self.prompt.tokens)), "1 where the group is"),
        }
        if self.params.controls:
            seed = Axis("seed", tuple(map(str, self.seeds)))
            number = Axis("draw", tuple(map(str, range(self.params.controls))))
            control = self.control.astype(np.float32)
            arrays["control"] = Trace(control, (seed, number, group, layer), "relative change")
        if self.patched:
            place = Axis("place", tuple(self.patched))
            for i, name in enumerate(("patched", "patched_counterfactual")):
                values = np.stack([found[i] for found in self.patched.values()]).astype(np.float32)
                arrays[name] = Trace(values, (place, layer), "probability")
        return Result(arrays, self._values())

    def _values(self) -> dict[str, Any]:
        """Scalars and short texts."""
        answer, tops = self.answer, np.unique(self.found[2][np.isfinite(self.found[2])]).astype(int)
        values = {
            "answer": answer.word,
            "answer_token": answer.id,
            "answer_rank": answer.rank,
            "model_answer": answer.own,
            "window": self.params.window,
            "sources": self.params.sources,
            "tokens": self.length,
            "top_words": {str(t): self.model.word(int(t)) for t in tops},
            "strongest": self._strongest(),
            "finding": self._finding(),
        }
        if self.patched:
            values |= {
                "counterfactual_answer": self.model.word(self.turned),
                "counterfactual_token": self.turned,
                "probability_in_counterfactual": self.turned_probability[0],
                "counterfactual_probability": self.turned_probability[1],
            }
        return values

    def _strongest(self) -> dict[str, dict[str, Any]]:
        """By group the layer of the strongest change, that change, and the mean of the random sets there."""
        found = {}
        for g, name in enumerate(self.sets):
            change = self.found[0, g] / self.answer.probability - 1
            if np.isnan(change).all():
                continue
            layer = int(np.nanargmax(np.abs(change)))
            draws = self.control[:, :, g, layer]
            control = float(np.nanmean(draws)) if np.isfinite(draws).any() else None
            found[name] = {"layer": layer, "change": float(change[layer]), "control": control}
        return found

    def _finding(self) -> str:
        """One sentence: what the strongest cuts of attribute, context and subject do."""
        strongest = self._strongest()
        most = sorted(strongest, key=lambda name: -abs(strongest[name]["change"]))
        named = [n for n in ("attribute", "context", "subject") if n in strongest] or most[:1]
        parts, who = [], "the last token" if self.params.sources == "last" else "later tokens"
        for name in named:
            change, control = strongest[name]["change"], strongest[name]["control"]
            beside = "" if control is None else f" (as many random tokens: {percent(control, signed=True)})"
            verb = "falls" if change < 0 else "rises"
            shown = f"the {name}" if name in GROUPS else f"token {name}" if ":" in name else name
            parts.append(f"{verb} by {percent(abs(change))} when {who} can't see {shown}{beside}")
        return f"{self.answer.word!r} ({self.answer.probability:.0%}) {'; '.join(parts)}." if parts else ""
