"""Filling staging from a hub that misbehaves. Real HTTP, the real huggingface_hub client."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelstore.errors import AccessDenied, ClaimLost, DigestMismatch, HubUnavailable, RepoNotFound, RevisionNotFound
from modelstore.fill.download import Download
from modelstore.fill.hub import HubSource
from modelstore.fill.progress import Progress
from modelstore.fill.source import SourceFile, backoff_s
from modelstore.fill.staged_file import GRANULE_BYTES, StagedFile
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.volume.checksums import Digests
from modelstore.volume.layout import StagingLayout
from tests.support.checkpoints import write_repo
from tests.support.hub import SIGNATURE, Hub, sha256_of

WEIGHTS = "model.safetensors"
SIZE = 10 * GRANULE_BYTES + 12345


@pytest.fixture
def repo(hub: Hub) -> Path:
    """A repo whose weights are random bytes: downloading does not care what they mean."""
    folder = write_repo(hub.folder / "org" / "name")
    (folder / WEIGHTS).write_bytes(os.urandom(SIZE))
    return folder


class Fetch:
    """One download of the repo's weights into `folder`, with the waiting between attempts recorded, not done."""

    def __init__(self, hub: Hub, folder: Path, *, token: str | None = None, connections: int = 4) -> None:
        settings = Settings(root=folder, hf_endpoint=hub.url, hf_token=token)
        self.slept: list[float] = []
        self.source = HubSource(parse_reference("org/name"), settings, sleep=self.slept.append)
        self.staging = StagingLayout(folder / "staging")
        self.progress = Progress()
        self.connections = connections
        self.digests: Digests | None = None
        self.path: Path | None = None

    def run(self, guard: Callable[[], None] = lambda: None, names: tuple[str, ...] = (WEIGHTS,)) -> None:
        resolved = self.source.resolve()
        files = [file for file in self.source.list_files(resolved) if file.path in names]
        assert len(files) == len(names)
        download = Download(
            self.source,
            resolved,
            self.staging,
            guard=guard,
            progress=self.progress,
            connections=self.connections,
            sleep=self.slept.append,
        )
        for staged in download.fetch(files):
            self.path, self.digests = staged.path, staged.digests


@pytest.fixture
def fetch(hub: Hub, repo: Path, tmp_path: Path) -> Fetch:
    return Fetch(hub, tmp_path / "volume")


def assert_whole(fetch: Fetch, repo: Path) -> None:
    assert fetch.path is not None
    assert fetch.digests is not None
    assert fetch.path.read_bytes() == (repo / WEIGHTS).read_bytes()
    assert fetch.digests.sha256 == sha256_of(repo / WEIGHTS)


def test_a_file_comes_in_ranges_and_once(fetch: Fetch, repo: Path, hub: Hub) -> None:
    fetch.run()
    assert_whole(fetch, repo)
    assert hub.served.bytes[WEIGHTS] == SIZE == fetch.progress.network == fetch.progress.done
    ranged = [path for server, method, path, _ in hub.served.requests if server == "storage" and method == "GET"]
    assert len(ranged) > 1


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: Hub, repo: Path, tmp_path: Path) -> None:
    fetch = Fetch(hub, tmp_path / "volume", token=hub.token)
    fetch.run()
    with_token = {server for server, _, _, had_token in hub.served.requests if had_token}
    assert with_token == {"hub"}
    assert any(server == "storage" for server, *_ in hub.served.requests)


def test_a_connection_that_is_cut_goes_on_from_there(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.cut_after[WEIGHTS] = [GRANULE_BYTES * 2 + 100, 50, GRANULE_BYTES]
    fetch.run()
    assert_whole(fetch, repo)
    assert hub.served.bytes[WEIGHTS] <= SIZE + 3 * GRANULE_BYTES


def test_429_is_waited_out_for_as_long_as_the_server_says(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.status[WEIGHTS] = [(429, {"Retry-After": "7"})]
    hub.faults.status["metadata"] = [(429, {"Retry-After": "9"})]
    fetch.run()
    assert_whole(fetch, repo)
    assert sorted(fetch.slept) == [7.0, 9.0]


def test_errors_of_the_server_are_tried_again_with_growing_pauses(fetch: Fetch, repo: Path, hub: Hub) -> None:
    fetch.connections = 1
    hub.faults.status[WEIGHTS] = [(500, {}), (503, {}), (502, {})]
    fetch.run()
    assert_whole(fetch, repo)
    assert fetch.slept == [0.5, 1.0, 2.0]


def test_a_server_that_breaks_ends_in_one_error_and_keeps_the_bytes(fetch: Fetch, repo: Path, hub: Hub) -> None:
    fetch.connections = 1
    hub.faults.cut_after[WEIGHTS] = [3 * GRANULE_BYTES + 1]

    def break_it() -> None:
        if fetch.progress.done:
            hub.faults.status.setdefault(WEIGHTS, [(500, {})] * 100)

    with pytest.raises(HubUnavailable, match="500"):
        fetch.run(guard=break_it)
    assert len(fetch.slept) == 5
    hub.faults.status.clear()
    again = Fetch(hub, fetch.staging.folder.parent)
    again.run()
    assert_whole(again, repo)
    assert again.progress.reused == fetch.progress.done > 0


def test_a_server_that_ignores_ranges_is_read_once(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.ignore_ranges = True
    fetch.run()
    assert_whole(fetch, repo)
    # The other connections' streams start at 0 too and are dropped after what the sockets had buffered.
    assert fetch.progress.network < 2 * SIZE


def test_a_server_that_ignores_ranges_and_cuts_goes_on(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.ignore_ranges = True
    hub.faults.cut_after[WEIGHTS] = [SIZE // 2] * 3
    fetch.run()
    assert_whole(fetch, repo)


def test_wrong_bytes_of_the_right_size_are_fetched_once_more(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.flip_byte_once.add(WEIGHTS)
    fetch.run()
    assert_whole(fetch, repo)
    assert fetch.progress.done == SIZE


def test_wrong_bytes_that_stay_are_refused(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.flip_byte.add(WEIGHTS)
    with pytest.raises(DigestMismatch, match="wrong bytes"):
        fetch.run()
    assert fetch.path is None


def test_wrong_bytes_of_a_small_file_are_refused_by_its_git_id(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.flip_byte.add("config.json")
    with pytest.raises(DigestMismatch):
        fetch.run(names=("config.json",))


@pytest.mark.parametrize("stated", [SIZE - 1, SIZE + 1])
def test_a_size_that_differs_from_the_stated_one_is_refused(fetch: Fetch, repo: Path, hub: Hub, stated: int) -> None:
    hub.faults.stated_size[WEIGHTS] = stated
    with pytest.raises(DigestMismatch, match="nothing was published"):
        fetch.run()


def test_a_download_that_was_stopped_goes_on_in_another_process(fetch: Fetch, repo: Path, hub: Hub) -> None:
    calls = 0

    def lose_the_claim() -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise ClaimLost("somebody else has it")

    with pytest.raises(ClaimLost):
        fetch.run(guard=lose_the_claim)
    first = hub.served.bytes[WEIGHTS]
    again = Fetch(hub, fetch.staging.folder.parent)
    again.run()
    assert_whole(again, repo)
    assert again.progress.reused > 0
    assert again.progress.reused + again.progress.network == SIZE
    assert first > 0


def test_sealed_segments_of_a_silent_host_are_copied_and_the_rest_is_not_touched(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MooseFS holds reads of what a lost host was writing for two minutes."""
    monkeypatch.setattr("modelstore.fill.staged_file._SEGMENT_GRANULES", 2)
    data = (repo / WEIGHTS).read_bytes()
    old, new = StagingLayout(tmp_path / "1"), StagingLayout(tmp_path / "2")
    left = StagedFile(SourceFile(WEIGHTS, SIZE), old)
    for index in (1, 0, 2, 3, 4):
        left.put(index, data[index * GRANULE_BYTES : (index + 1) * GRANULE_BYTES])
    left.close()
    pread = os.pread

    def pread_of_what_is_sealed(fd: int, size: int, offset: int) -> bytes:
        assert size != GRANULE_BYTES or offset < 4 * GRANULE_BYTES, "this would hang"
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread_of_what_is_sealed)
    mine = StagedFile(SourceFile(WEIGHTS, SIZE), new)
    assert mine.resume([old]) == 4 * GRANULE_BYTES
    assert mine.missing() == [(4, 11)]
    assert mine.path.read_bytes()[: 4 * GRANULE_BYTES] == data[: 4 * GRANULE_BYTES]
    mine.close()
    monkeypatch.setattr(os, "pread", pread)
    successor = StagedFile(SourceFile(WEIGHTS, SIZE), old)
    assert successor.resume() == 5 * GRANULE_BYTES  # of a dead process everything counts
    for index in (6, 5):
        successor.put(index, data[index * GRANULE_BYTES : (index + 1) * GRANULE_BYTES])
    successor.close()
    assert StagedFile(SourceFile(WEIGHTS, SIZE), old).resume() == 7 * GRANULE_BYTES


def test_damaged_bytes_on_the_volume_are_fetched_again(fetch: Fetch, repo: Path, hub: Hub) -> None:
    fetch.run()
    assert fetch.path is not None
    with fetch.path.open("r+b") as file:
        file.seek(3 * GRANULE_BYTES + 5)
        file.write(b"damage")
    again = Fetch(hub, fetch.staging.folder.parent)
    again.run()
    assert_whole(again, repo)
    assert again.progress.network == GRANULE_BYTES


def test_a_journal_of_another_file_counts_for_nothing(fetch: Fetch, repo: Path, hub: Hub) -> None:
    fetch.run()
    (repo / WEIGHTS).write_bytes(os.urandom(SIZE))
    again = Fetch(hub, fetch.staging.folder.parent)
    again.run()
    assert_whole(again, repo)
    assert again.progress.reused == 0


def test_an_empty_file_is_complete_at_once(hub: Hub, repo: Path, tmp_path: Path) -> None:
    (repo / "tokenizer.json").write_bytes(b"")
    fetch = Fetch(hub, tmp_path / "volume")
    fetch.run(names=("tokenizer.json",))
    assert fetch.path is not None
    assert fetch.path.read_bytes() == b""


def test_the_tree_is_read_page_by_page(fetch: Fetch, repo: Path, hub: Hub) -> None:
    hub.faults.tree_page = 1
    names = {file.path for file in fetch.source.list_files(fetch.source.resolve())}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert sum("/tree/" in path for path in hub.served.metadata_calls()) == 4


def test_a_gated_repo_opens_with_the_token_alone(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.gated.add("org/name")
    with pytest.raises(AccessDenied, match="set HF_TOKEN") as caught:
        Fetch(hub, tmp_path / "a").run()
    assert caught.value.exit_code == 4
    with pytest.raises(AccessDenied, match="check HF_TOKEN"):
        Fetch(hub, tmp_path / "b", token="hf_wrong").run()
    fetch = Fetch(hub, tmp_path / "c", token=hub.token)
    fetch.run()
    assert_whole(fetch, repo)


def test_a_private_repo_looks_unknown_without_its_token(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.private.add("org/name")
    with pytest.raises(RepoNotFound, match="if it is private, set HF_TOKEN"):
        Fetch(hub, tmp_path / "a").run()
    Fetch(hub, tmp_path / "b", token=hub.token).run()


def test_an_unknown_repo_and_an_unknown_revision_are_told_apart(hub: Hub, repo: Path, tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, hf_endpoint=hub.url)
    with pytest.raises(RepoNotFound):
        HubSource(parse_reference("org/unknown"), settings).resolve()
    with pytest.raises(RevisionNotFound, match="v9"):
        HubSource(parse_reference("org/name@v9"), settings).resolve()


def test_a_hub_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    slept: list[float] = []
    source = HubSource(
        parse_reference("org/name"), Settings(root=tmp_path, hf_endpoint="http://127.0.0.1:9"), sleep=slept.append
    )
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:9.*HF_ENDPOINT"):
        source.resolve()
    assert len(slept) == 4


@pytest.mark.parametrize("route", ["/revision/", "/tree/"])
def test_a_hub_that_accepts_and_stays_silent_is_given_up(
    hub: Hub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr("modelstore.fill.hub._METADATA_LIMIT_S", 0.2)
    hub.faults.silent.add(route)
    with pytest.raises(HubUnavailable, match="could not be reached"):
        Fetch(hub, tmp_path / "volume").run()


def test_no_error_shows_a_token_or_a_signed_address(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.faults.status[WEIGHTS] = [(403, {})] * 1000
    with pytest.raises(HubUnavailable) as caught:
        Fetch(hub, tmp_path / "volume", token=hub.token).run()
    error: BaseException | None = caught.value
    while error is not None:
        assert hub.token not in f"{error!r}"
        assert SIGNATURE not in f"{error!r}"
        error = error.__cause__


def test_granules_may_arrive_in_any_order(tmp_path: Path) -> None:
    data = os.urandom(5 * GRANULE_BYTES + 1)
    partial = StagedFile(SourceFile("x", len(data)), StagingLayout(tmp_path))
    for index in (5, 2, 0, 4, 1, 3):
        assert partial.put(index, data[index * GRANULE_BYTES : (index + 1) * GRANULE_BYTES])
    digests = partial.finish()
    whole = StagedFile(SourceFile("y", len(data)), StagingLayout(tmp_path))
    for index in range(6):
        whole.put(index, data[index * GRANULE_BYTES : (index + 1) * GRANULE_BYTES])
    assert whole.finish() == digests


@pytest.mark.parametrize(
    ("attempt", "asked", "expected"), [(1, None, 0.5), (4, None, 4.0), (1, 3.0, 3.0), (1, 9e9, 120.0)]
)
def test_the_pause_is_the_servers_within_reason(attempt: int, asked: float | None, expected: float) -> None:
    assert backoff_s(attempt, asked) == expected
