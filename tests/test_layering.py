"""Data flows one way: a file imports only from lines above its own, and the light ones stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "modelstore"
ORDER = [
    "collector", "units", "logs", "errors", "timeline", "reference", "layout", "settings", "manifest", "durable", "config_sizes", "claim", "progress", "observer", "sources",
    "wire", "hub", "checksums", "partial", "download", "header", "convert", "selection", "aliases", "catalog", "history", "pins", "evict", "space", "isolation", "unpickle",
    "estimate", "finished", "indexes", "peak", "fill", "verify", "store", "adopt", "s3", "gc", "look", "metrics", "report", "doctor", "blocks", "reader", "shared", "follow", "transfer", "tensors", "loader", "gpu", "host", "warmstart", "contenders", "bench", "bars", "console", "wanted", "adopt_cli", "alias_cli", "look_cli", "seed_cli", "cli",
]  # fmt: skip
HEAVY = {"torch", "transformers", "runpod", "accelerate"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return found


def test_the_order_names_every_file() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_lines_above_its_own(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    ours = {module.split(".")[1] for module in imports_of(PACKAGE / f"{name}.py") if module.startswith("modelstore.")}
    ours.discard("__version__")
    assert ours <= above, f"{name} imports {sorted(ours - above)}"


def test_only_tensors_and_the_loader_import_torch_and_transformers() -> None:
    # unpickle.py and contenders.py are processes of their own: nothing that imports them imports torch.
    allowed = {
        "tensors": {"torch"}, "loader": {"torch", "transformers", "accelerate"},
        "unpickle": {"torch"}, "contenders": {"torch", "transformers", "runpod"},
    }  # fmt: skip
    for path in PACKAGE.glob("*.py"):
        heavy = {module.split(".")[0] for module in imports_of(path)} & HEAVY
        assert heavy <= allowed.get(path.stem, set()), f"{path.stem} imports {sorted(heavy)}"


def test_only_settings_reads_the_environment() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem != "settings":
            assert "os.environ" not in path.read_text(), path


def test_only_durable_changes_the_volume() -> None:
    calls = ("os.write", "os.pwrite", "os.fsync", "os.rename", "os.replace", "os.link", "os.unlink", "write_bytes(")
    for path in PACKAGE.glob("*.py"):
        if path.stem != "durable":
            assert not [call for call in calls if call in path.read_text()], path


@pytest.mark.parametrize("module", ["modelstore.store", "modelstore.cli", "modelstore.warmstart"])
def test_looking_and_seeding_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[n for n in {sorted(HEAVY)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_hit_reads_before_anything_but_the_standard_library_is_imported() -> None:
    code = "import sys, modelstore.warmstart; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {"numpy", "huggingface_hub", "httpx", "httpx2", "typer", "rich", "filelock"} & set(done.stdout.split())
    assert not foreign
