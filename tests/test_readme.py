"""What the documents say is so."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from modelstore import errors
from modelstore.cli import app
from modelstore.settings import FIELDS

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()


def test_the_settings_table_is_the_one_of_the_code() -> None:
    rows = [f"| `{f.variable}` | {f'`{f.default}`' if f.default else ''} | {f.meaning} |" for f in FIELDS]
    table = re.search(r"<!-- settings -->\n(.*)<!-- /settings -->", README, re.DOTALL)
    assert table is not None
    assert table[1].splitlines() == ["| variable | default | meaning |", "|---|---|---|", *rows]


def test_every_command_that_is_shown_exists_and_every_command_is_shown() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^modelstore (\w+)", README, re.MULTILINE)) == commands


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    raised = {getattr(errors, name).exit_code for name in errors.__all__}
    assert listed == raised | {0}


def test_every_file_that_is_named_is_there() -> None:
    for document in (README, *(path.read_text() for path in (HERE / "docs").glob("*.md"))):
        for name in re.findall(r"(?:scripts|docs|modelstore|tests)/[\w./-]+\w", document):
            assert (HERE / name).exists() or name.startswith("modelstore/models"), name


def test_the_error_tree_in_its_docstring_is_the_tree() -> None:
    drawn = re.findall(r"(\w+)(?: \(\w+\))? +(\d)", errors.__doc__ or "")
    assert {name for name, _ in drawn} <= set(errors.__all__)
    for name, code in drawn:
        assert getattr(errors, name).exit_code == int(code), name


def test_every_feature_names_a_test_that_is_there() -> None:
    rows = re.findall(
        r"^\| .* \| `(test_\w+\.py)::(test_\w+)` \|$", (HERE / "docs" / "features.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    for file, name in rows:
        assert re.search(rf"^def {name}\(", (HERE / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_the_recorded_sessions_print_what_they_print_now() -> None:
    from scripts.record_session import PAGE, session

    def words(page: str) -> list[str]:
        """What does not change from run to run: no numbers, no hardware, no progress."""
        lines = [re.sub(r"[\d.]+( [kMGT]?B| s| MB/s)?|is on .*", "#", line) for line in page.splitlines()]
        return [" ".join(line.split()) for line in lines if not line.startswith(("INFO", "warning", "ok ", "  "))]

    page = PAGE.read_text()
    assert words(session(page)) == words(page), "run scripts/record_session.py"
