"""Parsing of model references."""

import pytest

from modelstore.errors import InvalidReference
from modelstore.reference import Reference, is_commit, local_repo_id, parse_reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("hub", "org/name", "main")),
        ("org/name@v1.0", Reference("hub", "org/name", "v1.0")),
        ("org/name@refs/pr/7", Reference("hub", "org/name", "refs/pr/7")),
        ("hf://org/name@dev", Reference("hub", "org/name", "dev")),
        ("file:///data/my%20model/", Reference("file", "/data/my model")),
        ("@chat", Reference("alias", "chat")),
    ],
)
def test_every_form_of_the_design_is_understood(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " org/name", "name", "org/", "/name", "a/b/c", "org/../x", "org/na me", "org/name@", "org/name@a..b",
        "org--x/y",
        "s3://org/name", "file://[x", "file://relative", "file:///a/../b", "file:///", "file://host/x", "@", "@Chat", "@a/b",
        "org/n\x00",
        "org/name@-x", "org/name.git", "-org/name", "org/" + "x" * 97,
    ],
)  # fmt: skip
def test_a_malformed_reference_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_bare_name_is_refused_with_a_hint_at_the_organisation() -> None:
    with pytest.raises(InvalidReference, match="org/gpt2"):
        parse_reference("gpt2")


def test_a_revision_fills_in_but_never_contradicts() -> None:
    assert parse_reference("org/name", revision="dev").revision == "dev"
    assert parse_reference("org/name@dev", revision="dev").revision == "dev"
    with pytest.raises(InvalidReference, match="keep one"):
        parse_reference("org/name@dev", revision="v2")
    with pytest.raises(InvalidReference, match="takes no revision"):
        parse_reference("file:///x", revision="v2")


def test_only_a_full_lower_case_hash_is_a_commit() -> None:
    assert is_commit("0" * 40)
    assert not is_commit("0" * 39)
    assert not is_commit("A" * 40)


@pytest.mark.parametrize(("folder", "repo_id"), [("/m/x y--z", "local/x-y-z"), ("/m/...", "local/folder")])
def test_a_folder_gets_a_repo_id_that_is_one(folder: str, repo_id: str) -> None:
    assert local_repo_id(Reference("file", folder)) == repo_id
