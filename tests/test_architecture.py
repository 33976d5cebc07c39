"""The house as a test: who imports whom, which library is fenced where, how large things may grow.

The tables below are the rules; README.md draws the same picture. Change both together, openly.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "pipeline", "jobs")
TOP_LEVEL = {"pipeline", "conf", "jobs", "kernels", "tests", "pyproject.toml", "Makefile", "README.md", "LICENSE",
             "constraints.txt"}  # fmt: skip

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8

# importer -> what it may import; a package stands for all its modules. The longest matching importer counts.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": {"kernels"},
    "pipeline": set(),
    "pipeline.errors": set(),
    "pipeline.geometry": set(),
    "pipeline.telemetry": set(),
    # What a layout is and must divide is a record: settings, plans and results mean the same by its name.
    "pipeline.config": {"pipeline.errors", "pipeline.records.parallel"},
    "pipeline.records": {"pipeline.errors", "pipeline.geometry"},
    "pipeline.model": {"kernels.ops", "kernels.rows", "pipeline.geometry", "pipeline.errors"},
    "pipeline.media": {"pipeline.errors", "pipeline.geometry", "pipeline.records.frames"},
    "pipeline.storage": {"pipeline.errors", "pipeline.records"},
    "pipeline.cost": {"pipeline.errors", "pipeline.config", "pipeline.records"},
    # Rebuilds pages from a run's folder, so it also reads runs and writes the page.
    "pipeline.report": {"pipeline.errors", "pipeline.config", "pipeline.records", "pipeline.cost", "pipeline.storage"},
    "pipeline.planning": {"pipeline.errors", "pipeline.config", "pipeline.geometry", "pipeline.records",
                          "pipeline.cost.pricing"},
    # Judges which paths a submitted job can reach, so it asks what a local URI is.
    "pipeline.planning.reach": {"pipeline.errors", "pipeline.config", "pipeline.storage.filesystem"},
    "pipeline.engine": {"pipeline.errors", "pipeline.config", "pipeline.geometry", "pipeline.telemetry",
                        "pipeline.records.frames", "pipeline.records.request", "pipeline.records.work", "kernels.ops",
                        "pipeline.model"},
    "pipeline.parallel": {"pipeline.errors", "pipeline.model", "pipeline.records.parallel", "pipeline.records.gang",
                          "kernels.ops", "kernels.rows"},
    "pipeline.attempt": {"pipeline.records", "pipeline.storage.assets", "pipeline.cost.meter",
                         "pipeline.cluster.assignment"},
    "pipeline.accord": {"pipeline.errors"},
    "pipeline.rendering": {"pipeline.accord", "pipeline.config", "pipeline.records", "pipeline.engine.engine",
                           "pipeline.storage.filesystem", "pipeline.storage.adapters",
                           "pipeline.cost.meter", "pipeline.errors", "pipeline.cluster.assignment"},
    "pipeline.worker": {"pipeline.accord", "pipeline.attempt", "pipeline.rendering",
                        "pipeline.records", "pipeline.engine.engine",
                        "pipeline.media", "pipeline.storage.assets", "pipeline.storage.store",
                        "pipeline.storage.patience",
                        "pipeline.cost.meter", "pipeline.errors", "pipeline.cluster.assignment"},
    # A pool owns its workers' time, so it holds their meters, and says what layouts are chosen by; the driver applies
    # the policy's decisions and sums the ledger; the folder of a Ray of ours is named for its driver as files are.
    "pipeline.cluster": {"pipeline.errors", "pipeline.config", "pipeline.telemetry", "pipeline.records",
                         "pipeline.planning.queue", "pipeline.planning.policy", "pipeline.planning.pace",
                         "pipeline.planning.layout_choice", "pipeline.planning.timetable",
                         "pipeline.cost.meter", "pipeline.cost.pricing", "pipeline.cost.allocation",
                         "pipeline.storage.processes"},
    # Composes denoisers and decoders as a worker does, with others' beside them, and counts operations as the planner;
    # encodes as a worker does; sums up what a run left.
    "pipeline.bench": {"pipeline.config", "pipeline.errors", "pipeline.geometry", "pipeline.engine", "pipeline.model",
                       "pipeline.planning.estimate", "pipeline.planning.sparsity", "pipeline.records.frames",
                       "pipeline.records.outcome", "pipeline.media", "kernels",
                       # Spreads a clip as a gang of workers does.
                       "pipeline.parallel", "pipeline.records.parallel", "pipeline.records.gang"},
    # Times clips as customers get them: a worker's own assembly, with a store in a folder, of requests made here.
    "pipeline.bench.latency": {"pipeline.bench", "pipeline.assembly.worker_side", "pipeline.cluster.assignment",
                               "pipeline.config", "pipeline.cost.meter", "pipeline.cost.pricing", "pipeline.engine",
                               "pipeline.errors", "pipeline.geometry", "pipeline.media.natural_clip",
                               "pipeline.planning.estimate", "pipeline.records", "pipeline.rendering",
                               "pipeline.storage.filesystem", "pipeline.storage.store", "pipeline.worker"},
    "pipeline.assembly.brief": {"pipeline.config", "pipeline.records"},
    "pipeline.assembly.model_facts": {"pipeline.config", "pipeline.records.wishes", "pipeline.storage",
                                      "pipeline.errors"},
    "pipeline.assembly.closing": {"pipeline.cluster.ending", "pipeline.cost.allocation", "pipeline.planning.plan",
                                "pipeline.records"},
    "pipeline.assembly.worker_side": {"pipeline.assembly.brief", "pipeline.config", "pipeline.worker",
                                      "pipeline.accord", "pipeline.rendering", "pipeline.parallel",
                                      "pipeline.engine", "pipeline.model",
                                      "kernels.ops", "pipeline.storage.models",
                                      "pipeline.storage.store", "pipeline.cost.meter",
                                      "pipeline.records", "pipeline.media.mux", "pipeline.errors"},
    "pipeline.assembly.driver_side": {"pipeline.assembly.closing", "pipeline.assembly.brief",
                                      "pipeline.assembly.model_facts",
                                      "pipeline.config", "pipeline.planning",
                                      "pipeline.storage", "pipeline.cost",
                                      "pipeline.cluster", "pipeline.records", "pipeline.errors",
                                      "pipeline.report.rebuild", "pipeline.assembly.worker_side"},
    "jobs": {"pipeline.config", "pipeline.errors"},
    "jobs.entry": {"pipeline.config", "pipeline.errors", "pipeline.telemetry"},
    "jobs.quote": {"pipeline.config", "pipeline.errors", "pipeline.assembly.driver_side", "pipeline.cost.pricing",
                   "pipeline.planning", "pipeline.storage"},
    "jobs.render": {"pipeline.config", "pipeline.errors", "pipeline.assembly.driver_side",
                    "pipeline.cluster.ending", "pipeline.cluster.progress", "pipeline.storage.models",
                    "pipeline.storage.filesystem", "pipeline.planning.reach"},
    "jobs.report": {"pipeline.config", "pipeline.errors", "pipeline.report.rebuild", "pipeline.storage.store"},
    "jobs.submit": {"pipeline.config", "pipeline.errors", "pipeline.planning.reach"},
    "jobs.stage_weights": {"pipeline.config", "pipeline.storage.models", "pipeline.storage.hub",
                           "pipeline.storage.filesystem", "pipeline.engine.nano"},
    # Runs jobs.render as a process of its own and reads what it left; writes model files to measure with.
    "jobs.bench": {"pipeline.bench", "pipeline.config", "pipeline.errors", "pipeline.geometry", "pipeline.storage",
                   "pipeline.media.probe",
                   "pipeline.engine.nano", "pipeline.engine.random_weights"},
}  # fmt: skip

# library -> the only modules that may import it.
FENCES: dict[str, tuple[str, ...]] = {
    "triton": ("kernels",),
    "torch": (
        "kernels",
        "pipeline.model",
        "pipeline.parallel",
        "pipeline.engine",
        "pipeline.assembly.worker_side",
        "pipeline.bench",
    ),
    "torch.distributed": ("pipeline.parallel",),
    # The bench times its denoiser as a peer.
    "xfuser": ("pipeline.parallel", "pipeline.bench.xdit"),
    "flash_attn": ("kernels.flash_attention",),
    "safetensors": ("pipeline.model.checkpoint", "pipeline.engine.nano"),
    # The bench times it as a peer.
    "diffusers": ("pipeline.engine.components", "pipeline.engine.nano", "pipeline.bench.peers"),
    "transformers": ("pipeline.engine.components", "pipeline.engine.nano"),
    "tokenizers": ("pipeline.engine.nano",),
    "av": ("pipeline.media",),
    "PIL": ("pipeline.media",),
    "fsspec": ("pipeline.storage",),
    "pyarrow": ("pipeline.storage",),
    "hydra": ("jobs",),
    # jobs.entry names a type and an error of it.
    "omegaconf": ("pipeline.config", "jobs.entry"),
    # The workers, and the packaging and client of submitted jobs.
    "ray": (
        "pipeline.cluster.actor",
        "pipeline.cluster.ray_pool",
        "pipeline.cluster.ray_session",
        "pipeline.cluster.placement",
        "pipeline.cluster.teardown",
        "pipeline.cluster.node_watch",
        "pipeline.cluster.rank_death",
        "jobs.submit",
    ),
}

# Imports inside functions: module -> why it may.
FUNCTION_IMPORTS = {
    "pipeline.assembly.driver_side": "the worker factory and the Ray pool: torch loads in workers, ray when asked for",
    "pipeline.storage.clients": "the session of the S3 client: that loads only where there is a bucket",
    "jobs.stage_weights": "the nano builder: torch loads only when there is something to build",
    "pipeline.bench.gang_entrants": "the peer that needs GPUs, with diffusers: ranks without it start sooner",
    "pipeline.bench.xdit": "xfuser, which cannot be imported without an accelerator",
    "pipeline.parallel.xfuser_usp": "xfuser, which cannot be imported without an accelerator",
    "jobs.bench": "random weights and measuring: torch and the peers load only when there is something to do",
    "kernels.ops": "the Triton kernels: torch for the CPU comes without Triton; and libraries of a gigabyte",
}


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def _imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module of a file, `from a import b` as `a.b` where that is a module of ours, else as `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node


def _within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


def _longest(module: str, table: dict[str, set[str]]) -> str:
    return max((key for key in table if _within(module, key)), key=len)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_floor_allows(module: str) -> None:
    importer = _longest(module, MAY_IMPORT)
    # A module beside the packages is named in the table, or may import nothing of ours.
    own = {importer} - {"pipeline"} | ({"jobs"} if importer.startswith("jobs") else set())
    allowed = MAY_IMPORT[importer] | own
    for imported, node in _imports(ast.parse(MODULES[module].read_text())):
        if imported.split(".")[0] in PACKAGES:
            assert any(_within(imported, name) for name in allowed), (
                f"{module}:{node.lineno} imports {imported}; {importer} may import {sorted(allowed)}"
            )


@pytest.mark.parametrize("module", MODULES)
def test_library_stays_inside_its_fence(module: str) -> None:
    for imported, node in _imports(ast.parse(MODULES[module].read_text())):
        for fence in (FENCES[library] for library in FENCES if _within(imported, library)):
            assert any(_within(module, name) for name in fence), (
                f"{module}:{node.lineno} imports {imported}, which belongs to {fence}"
            )


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top_but_for_named_places(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    inside = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for _, node in _imports(function)
    ]
    assert not inside or module in FUNCTION_IMPORTS, f"{module}:{inside[0].lineno} imports inside a function"


def test_import_graph_has_no_loop() -> None:
    graph = {
        module: {name for name, _ in _imports(ast.parse(path.read_text())) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_files_functions_and_argument_lists_stay_small(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{module} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {length} lines"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            # A GPU is handed addresses and numbers one by one: it knows no records.
            on_gpu = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
            assert on_gpu or count <= MAX_ARGUMENTS, f"{module}.{node.name} takes {count} arguments"


@pytest.mark.parametrize("module", MODULES)
def test_module_opens_with_a_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), f"{module} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("__init__.py")), ids=str)
def test_package_files_hold_a_docstring_and_no_code(path: Path) -> None:
    assert len(ast.parse(path.read_text()).body) == 1


def test_top_level_is_the_customers() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def _members() -> list[tuple[str, str]]:
    groups = [path for path in sorted((ROOT / "conf").iterdir()) if path.is_dir()]
    return [(group.name, path.stem) for group in groups for path in sorted(group.glob("*.yaml"))]


def test_every_yaml_composes_and_says_its_own_name() -> None:
    script = (
        "import json, sys\n"
        "from jobs.entry import RenderJob, compose_job\n"
        # Layouts need room: processes for their GPUs, heads and predictions to divide.
        "room = ['cluster=local', 'model=ltx2_19b_dev', 'recipe=full_two_stage']\n"
        "for group, member in json.load(sys.stdin):\n"
        "    beside = room if group == 'parallel' else []\n"
        "    job = compose_job(RenderJob, 'render', [f'{group}={member}', *beside])\n"
        "    assert getattr(job, group).name == member, (group, member)\n"
    )
    members = _members()
    assert len(members) >= 9
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, input=json.dumps(members), text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_our_kernels_folder_is_not_taken_for_the_hugging_face_distribution() -> None:
    """transformers raises on a `kernels` package without a version, and would import its names from ours."""
    source = (ROOT / "kernels" / "__init__.py").read_text()
    assert '__version__ = "0"' in source
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_driver_estimate_and_report_load_without_torch() -> None:
    script = (
        "import sys, jobs.estimate, jobs.report, jobs.render\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
