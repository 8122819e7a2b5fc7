"""Names that may become paths, and the paths."""

from pathlib import Path

import pytest

from modelstore.errors import UnsafeName
from modelstore.volume.layout import Layout, SnapshotKey, check_file_name, check_file_names, key_from_parts

HOSTILE = [
    "", "/etc/passwd", "..", "../x", "a/../../x", "a/./b", "a//b", "a/", "C:/x", "c:x", "a\\b", "a\x00b", "a\nb",
    "a\x1bb", "a\x85b", "manifest.json", "Manifest.JSON", "manifest.json/x", "con", "AUX.txt", "a/nul.json", "com1", "x" * 256,
    "/".join(["x" * 200] * 6), "\udc80",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_name_is_refused(name: str) -> None:
    with pytest.raises(UnsafeName) as caught:
        check_file_name(name)
    assert caught.value.exit_code == 8
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "a/b/c.safetensors", "1_Pooling/config.json", "naïve.txt", "manifest"])
def test_an_ordinary_name_passes(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize("names", [["a.json", "A.json"], ["x/y", "x"], ["X/y", "x"]])
def test_names_that_collide_are_refused_together(names: list[str]) -> None:
    with pytest.raises(UnsafeName):
        check_file_names(names)


def test_a_key_comes_back_from_its_path() -> None:
    key = SnapshotKey("org/na-me", "a" * 40, "float16")
    path = Layout(Path("/r")).snapshot(key)
    assert path == Path("/r/models/org--na-me") / f"{'a' * 40}.float16"
    assert key_from_parts(path.parent.name, path.name) == key


@pytest.mark.parametrize("variant", ["x.float16", "a" * 40, "a" * 40 + ".int3", "a" * 40 + "."])
def test_a_folder_that_is_no_snapshot_has_no_key(variant: str) -> None:
    assert key_from_parts("org--name", variant) is None


def test_a_revision_of_any_length_gets_a_file_name() -> None:
    layout = Layout(Path("/r"))
    assert layout.ref("org/name", "refs/pr/7").name == "refs%2Fpr%2F7.json"
    assert len(layout.ref("org/name", "/" * 250).name) < 100
