"""The architecture, held over the source itself: imports point down, and each door has its file."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
LEVELS = {
    **dict.fromkeys(("studio.types", "studio.errors"), 0),
    **dict.fromkeys(("studio.registry", "studio.measure", "studio.figures"), 1),
    **dict.fromkeys(("studio.store", "studio.exports", "studio.images", "studio.uploads"), 1),
    "studio.file_quota": 1,
    **dict.fromkeys(("studio.disk", "studio.rescue", "studio.run_record"), 1),
    **dict.fromkeys(("studio.kept_edits", "studio.run_notes", "studio.run_bin", "studio.run_index"), 1),
    **dict.fromkeys(("studio.run_quota", "studio.run_difference", "studio.run_grid"), 1),
    **dict.fromkeys(("studio.recipes", "studio.restore", "studio.zip_import", "studio.palette"), 1),
    **dict.fromkeys(("studio.run_export", "studio.notebook", "studio.latex", "studio.citations"), 1),
    "studio.models": 2,
    **dict.fromkeys(("studio.edits", "studio.edit_files", "studio.edit_export", "studio.solver_race"), 3),
    "studio.vision_race": 3,
    "studio.given_files": 3,
    "studio.atlas": 3,
    **dict.fromkeys(("studio.methods", "studio.audit", "studio.language_race"), 4),
    **dict.fromkeys(
        (
            "studio.session",
            "studio.jobs",
            "studio.provenance",
            "studio.replay",
            "studio.runners",
            "studio.sweep",
            "studio.sweep_file",
            "studio.sweep_tables",
            "studio.doctor",
            "studio.retrieval",
        ),
        5,
    ),
    **dict.fromkeys(("studio", "studio.bench", "studio.planted"), 6),
    **dict.fromkeys(("studio.planted_components", "studio.planted_vision", "studio.diffusion_race"), 6),
    **dict.fromkeys(("studio.start_race", "studio.growth_race", "studio.share_race"), 6),
    **dict.fromkeys(("studio.naive_race", "studio.bench_page", "studio.bench_cover"), 6),
    **dict.fromkeys(("studio.method_race", "studio.naive_image_race", "studio.naive_vision_race"), 6),
    "studio.switch_race": 6,
    **dict.fromkeys(("studio.spurious_correlation", "studio.real_shapes"), 6),
    "panels": 7,
    **dict.fromkeys(("studio.cli", "studio.commands", "studio.run_commands", "studio.options", "launch"), 8),
    "studio.store_commands": 8,
    "studio.prompt_command": 8,
}
WRITING = (
    *(
        "store",
        "kept_edits",
        "run_notes",
        "run_bin",
        "run_quota",
        "file_quota",
        "exports",
        "uploads",
        "zip_import",
        "rescue",
    ),
    "bench",
)
WITHOUT_TORCH = ("images", "types", "errors", "registry", "figures", "store", "exports", "uploads", "measure")

# (file, what is done there): why it may be.
EXCEPTIONS = {
    ("studio/registry.py", "import studio.methods"): "the registry finds method files by name, to list them",
    ("studio/figures.py", "write savefig"): "draws into memory",
    ("studio/notebook.py", "write savez_compressed"): "packs numbers in memory",
    ("studio/doctor.py", "write makedirs"): "doctor tries whether runs can be written",
    ("studio/doctor.py", "write TemporaryFile"): "doctor tries whether runs can be written",
    ("studio/real_shapes.py", "random torch.manual_seed"): "random weights, the same in every measurement",
    ("studio/runners.py", "write TemporaryDirectory"): "Ray's own files, for as long as its cluster lives",
    ("panels/localize.py", "write TemporaryDirectory"): "the store takes an edit over from there",
}

WRITERS = set(
    "write_text write_bytes mkdir makedirs touch symlink_to hardlink_to unlink rmdir rmtree rename savefig "
    "save_file save_pretrained savez savez_compressed savetxt tofile copyfile copytree copy2 mkdtemp mkstemp "
    "TemporaryFile NamedTemporaryFile TemporaryDirectory".split()
)
WRITING_MODULES = {"np.save", "numpy.save", "torch.save", "json.dump", "pickle.dump", "os.replace"}
WRITING_MODULES |= {"os.remove", "shutil.copy", "shutil.move"}
MODES = {"open": 1, "ZipFile": 1}  # the place of the mode among a call's arguments
DRAWS = set("rand randn randint randperm normal bernoulli multinomial rand_like randn_like".split())

Finding = tuple[str, str]


def sources(tree: Path, only: str = "") -> Iterator[tuple[str, ast.Module]]:
    """(path below the tree, syntax tree) of every source file, or of one."""
    for file in sorted([*tree.glob("studio/**/*.py"), *tree.glob("panels/**/*.py"), *tree.glob("launch.py")]):
        if (path := file.relative_to(tree).as_posix()) == only or not only:
            yield path, ast.parse(file.read_text("utf-8"))


def module_of(path: str) -> str:
    """studio/models/hooks.py is studio.models.hooks."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def level_of(module: str) -> int | None:
    """The level of a module of ours; KeyError for one that has no room."""
    parts = module.split(".")
    if parts[0] not in ("studio", "panels", "launch"):
        return None
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in LEVELS and (n > 1 or len(parts) == 1 or name != "studio"):
            return LEVELS[name]
    raise KeyError(f"{module} has no level; give it one in DESIGN.md and in this test")


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute chain, the end of it where it starts with something else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(code: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call."""
    for node in ast.walk(code):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def imported(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Every module that the file imports, anywhere in it, also by a literal name."""
    package = module_of(path).split(".") + ["_"] * path.endswith("__init__.py")
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
            )
            for alias in node.names:
                file = tree / base.replace(".", "/") / alias.name
                whole = file.is_dir() or file.with_suffix(".py").exists()
                yield f"{base}.{alias.name}" if whole else base
    for name, call in calls(code):
        if (
            name.endswith(("import_module", "__import__"))
            and call.args
            and isinstance(call.args[0], ast.Constant)
        ):
            yield str(call.args[0].value)


def upward(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Imports from a higher level."""
    own = level_of(module_of(path))
    for name in imported(path, code, tree):
        if (other := level_of(name)) is not None and other > own:
            yield f"import {name}"


def torch_imports(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Torch in a file that must open without it."""
    barred = path.startswith("panels/") or path in {f"studio/{n}.py" for n in WITHOUT_TORCH}
    heavy = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "timm")
    for name in imported(path, code, tree) if barred else ():
        if name.split(".")[0] in heavy:
            yield f"import {name}"


def hooks(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Hooks outside hooks.py."""
    for name, _ in calls(code) if path != "studio/models/hooks.py" else ():
        last = name.split(".")[-1]
        if last.startswith("register_") and "hook" in last:
            yield f"hook {last}"


def writes(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Writing outside the store, what it offers for download, the benchmark and the training of Atlas."""
    if path in {f"studio/{n}.py" for n in WRITING} or path.startswith("studio/atlas/"):
        return
    for name, call in calls(code):
        last = name.split(".")[-1]
        mode = [k.value for k in call.keywords if k.arg == "mode"]
        if last in MODES:
            place = 0 if last == "open" and "." in name else MODES[last]
            mode += call.args[place : place + 1]
        text = [m.value for m in mode if isinstance(m, ast.Constant) and isinstance(m.value, str)]
        if (
            last in WRITERS
            or name in WRITING_MODULES
            or any(set(m) & set("wax+") and set(m) <= set("rwaxbtU+") for m in text)
        ):
            yield f"write {name if name in WRITING_MODULES else last}"


def randomness(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Global seeds outside Session, and draws that name no generator."""
    if path in ("studio/session.py", "studio/bench.py") or path.startswith("studio/atlas/"):
        return
    for name in imported(path, code, tree):
        if name.split(".")[0] == "random":
            yield "random import"
    for name, call in calls(code):
        first, last = name.split(".")[0], name.split(".")[-1]
        if name.startswith(("torch.manual_seed", "torch.cuda.manual_seed", "np.random.", "numpy.random.")):
            yield f"random {name}"
        elif first == "torch" and last in DRAWS and "generator" not in {k.arg for k in call.keywords}:
            yield f"random {name}"
        elif (
            first == "torch" and last in DRAWS and not path.startswith(("studio/models/", "studio/methods/"))
        ):
            yield f"random {name}"


def too_long(path: str, code: ast.Module, tree: Path) -> Iterator[str]:
    """Files over 400 lines, functions over 40 with their decorators left out."""
    if (lines := len((tree / path).read_text("utf-8").splitlines())) > 400:
        yield f"{lines} lines"
    for node in ast.walk(code):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := node.end_lineno - node.lineno + 1) > 40:
                yield f"{node.name} {lines} lines"


Rule = Callable[[str, ast.Module, Path], Iterator[str]]
RULES: tuple[Rule, ...] = (upward, torch_imports, hooks, writes, randomness, too_long)


def findings(rule: Rule, tree: Path = TREE, only: str = "") -> set[Finding]:
    """(file, what is done there) of everything that breaks the rule, in the whole tree or in one file."""
    return {(path, what) for path, code in sources(tree, only) for what in rule(path, code, tree)}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_tree_keeps(rule: Rule) -> None:
    assert sorted(findings(rule) - EXCEPTIONS.keys()) == []


def test_no_exception_is_stale() -> None:
    assert EXCEPTIONS.keys() - set().union(*map(findings, RULES)) == set()


ERRORS = len((TREE / "studio/errors.py").read_text("utf-8").splitlines())
PLANTED = {
    "up": (upward, "studio/types.py", "import studio.session", "import studio.session"),
    "up, one name": (upward, "studio/store.py", "from studio import edits", "import studio.edits"),
    "up, in a function": (
        upward,
        "studio/models/tokens.py",
        "def f():\n    from studio.methods.generate import draw",
        "import studio.methods.generate",
    ),
    "up, relative": (upward, "studio/models/base.py", "from ..session import x", "import studio.session"),
    "up, by a literal": (upward, "studio/jobs.py", "import_module('panels')", "import panels"),
    "to the façade": (upward, "studio/session.py", "import studio", "import studio"),
    "torch": (torch_imports, "studio/store.py", "def f():\n    import torch.nn", "import torch.nn"),
    "torch in a panel": (torch_imports, "panels/heatmap.py", "from torch import nn", "import torch"),
    "hook": (hooks, "studio/edits.py", "m.register_forward_pre_hook(f)", "hook register_forward_pre_hook"),
    "open": (writes, "studio/session.py", "open('x', 'w')", "write open"),
    "open, by name": (writes, "studio/session.py", "open('x', mode='ab')", "write open"),
    "path.open": (writes, "studio/session.py", "p.open('r+')", "write open"),
    "write_text": (writes, "panels/trace.py", "p.write_text('x')", "write write_text"),
    "write_bytes": (writes, "studio/figures.py", "p.write_bytes(b'x')", "write write_bytes"),
    "np.save": (writes, "studio/methods/generate.py", "np.save('x', a)", "write np.save"),
    "global seed": (randomness, "studio/edits.py", "torch.manual_seed(0)", "random torch.manual_seed"),
    "NumPy": (randomness, "studio/measure.py", "np.random.default_rng(0)", "random np.random.default_rng"),
    "no generator": (randomness, "studio/models/base.py", "torch.randn(2)", "random torch.randn"),
    "random": (randomness, "panels/trace.py", "from random import choice", "random import"),
    "long file": (too_long, "studio/errors.py", "x = 1\n" * 400, f"{ERRORS + 400} lines"),
    "long function": (too_long, "studio/errors.py", "def f():\n" + "    x = 1\n" * 40, "f 41 lines"),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("studio", "panels"):
        shutil.copytree(TREE / name, root / name, ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
    return root


@pytest.mark.parametrize(("rule", "file", "line", "found"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(clean: Path, rule: Rule, file: str, line: str, found: str) -> None:
    before, whole = findings(rule, clean, file), (clean / file).read_text("utf-8")
    try:
        (clean / file).write_text(f"{whole}\n{line}\n" if rule is not too_long else whole + line, "utf-8")
        assert findings(rule, clean, file) - before == {(file, found)}
    finally:
        (clean / file).write_text(whole, "utf-8")


def test_reading_is_not_writing(clean: Path) -> None:
    harmless = "open('x'); open('x', 'rb'); p.open(); p.open('rb'); d.replace('a', 'w'); replace(run, id='w')"
    assert list(writes("studio/session.py", ast.parse(harmless), clean)) == []


def test_a_new_file_without_a_level_is_noticed() -> None:
    assert level_of("studio.models.new") == 2 and level_of("numpy") is None and level_of("studio") == 6
    with pytest.raises(KeyError, match="studio.utils has no level"):
        level_of("studio.utils")


def after(code: str) -> set[str]:
    """The top-level modules that are loaded after this code in a fresh process."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    ["import studio.cli; assert 'locus' in studio.cli.overview()"]
    + [f"import studio.{name}" for name in WITHOUT_TORCH]
    + ["import studio; studio.Store, studio.Recipe, studio.read_run"],
)
def test_help_and_records_open_without_the_heavy_libraries(code: str) -> None:
    heavy = {"torch", "gradio", "matplotlib", "diffusers", "transformers", "scipy", "fastapi"}
    loaded = after(code)
    assert not loaded & heavy and "studio" in loaded
