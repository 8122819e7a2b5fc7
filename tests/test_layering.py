"""Imports go one way: from each floor of the package only to the floors below it, and the light floors stay light."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each floor, lowest first, with the floors that its files may import. A file may import the files of its own floor.
FLOORS = {
    "ground": set(),
    "volume": {"ground"},
    "fill": {"ground", "volume"},
    "load": {"ground", "volume"},
    "store": {"ground", "volume", "fill"},
    "start": {"ground", "volume", "fill", "load", "store"},
    "operate": {"ground", "volume", "fill", "store"},
    "bench": {"ground", "volume", "load", "store", "start"},
    "cli": {"ground", "volume", "fill", "load", "store", "start", "operate", "bench"},
    "handler": {"ground", "volume", "load", "store", "start"},
}
GROUND = {
    "errors",
    "units",
    "copying",
    "logs",
    "timeline",
    "reference",
    "dtypes",
    "mount",
    "settings",
    "worker_vllm",
    "environment",
    "isolation",
    "runtime",
    "processors",
    "startup",
    "model_types",
    "servable",
}
ALONE = {
    "store": "store",
    "single_fill": "store",
    "adapters": "start",
    "prefetch": "start",
    "private_copy": "start",
    "warmstart": "start",
    "pending_start": "start",
    "serve_weights": "start",
}

PACKAGES = [path.parent for top in ("modelstore", "handler") for path in (ROOT / top).rglob("__init__.py")]
PACKAGES.remove(ROOT / "modelstore")  # its docstring is for its users


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_docstring_of_a_package_names_each_of_its_files(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {name for name in files if not re.search(rf"\b{name}\b", docstring)} == set()


HEAVY = {"torch", "transformers", "runpod", "accelerate"}
# pickles and loaders are programs of their own: nothing that imports them imports torch.
MAY_IMPORT_HEAVY = {
    "modelstore.load.tensors": {"torch"},
    "modelstore.load.views": {"torch"},
    "modelstore.load.torch_device": {"torch"},
    "modelstore.load.model": {"torch", "transformers", "accelerate"},
    "modelstore.load.model_class": {"transformers"},
    "modelstore.fill.pickles": {"torch"},
    "modelstore.servable": {"transformers"},  # about a type that its table does not have
    "modelstore.bench.loaders": {"torch", "transformers", "runpod"},
}
WRITES = ("os.write", "os.pwrite", "os.fsync", "os.rename", "os.replace", "os.link", "os.unlink", "write_bytes(")


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Each module of a package with its file, but for the entry points."""
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def floor_of(module: str) -> str | None:
    """The floor that a module belongs to; None if it is not ours, or the package itself."""
    top, _, rest = module.partition(".")
    if top == "handler":
        return "handler"
    if top != "modelstore" or not rest:
        return None
    name = rest.partition(".")[0]
    if name in GROUND:
        return "ground"
    return ALONE.get(name, name if name in FLOORS else None)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return names


MODULES = [*modules("modelstore"), *modules("handler")]


def test_every_module_stands_on_a_floor() -> None:
    assert not [module for module, _path in MODULES if floor_of(module) is None]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _path in MODULES])
def test_a_module_imports_only_from_its_own_floor_and_those_below(module: str, path: Path) -> None:
    floor = floor_of(module)
    assert floor is not None
    imported = {name: floor_of(name) for name in imports_of(path)}
    upward = {name for name, other in imported.items() if other not in FLOORS[floor] | {floor, None}}
    assert not upward, f"{module} imports {sorted(upward)}"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: {name for name in imports_of(path) if name in dict(MODULES)} for module, path in MODULES}
    while graph:  # take away what imports nothing that is left, until all is gone or a circle remains
        free = {module for module, names in graph.items() if not names & graph.keys()}
        assert free, f"these import each other in a circle: {sorted(graph)}"
        graph = {module: names for module, names in graph.items() if module not in free}


def test_only_the_loading_side_imports_torch_and_transformers() -> None:
    for module, path in modules("modelstore"):
        heavy = {name.split(".")[0] for name in imports_of(path)} & HEAVY
        assert heavy <= MAY_IMPORT_HEAVY.get(module, set()), f"{module} imports {sorted(heavy)}"


def test_only_settings_reads_the_environment() -> None:
    readers = [module for module, path in modules("modelstore") if "os.environ" in path.read_text()]
    assert readers == ["modelstore.environment", "modelstore.settings"]


def test_only_durable_changes_the_volume() -> None:
    for module, path in modules("modelstore"):
        if module != "modelstore.volume.durable":
            assert not [call for call in WRITES if call in path.read_text()], module


def test_package_doors_import_nothing() -> None:
    # A hit imports the packages on its way: whatever a door imported, each start would wait for.
    for path in (ROOT / "modelstore").glob("*/__init__.py"):
        assert not imports_of(path), path


@pytest.mark.parametrize("module", ["modelstore.store", "modelstore.cli.main", "modelstore.warmstart"])
def test_looking_and_seeding_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[n for n in {sorted(HEAVY)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_hit_reads_before_anything_but_the_standard_library_is_imported() -> None:
    code = "import sys, modelstore.warmstart; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {"numpy", "huggingface_hub", "httpx", "httpx2", "typer", "rich", "filelock"} & set(done.stdout.split())
    assert not foreign
