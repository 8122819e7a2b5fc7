"""Which source answers a reference, and in which order. Nothing else knows it.

    file:///folder     the folder
    org/name           an HF cache on the volume that has all of the model, because it costs no network; else the Hub,
                       unless MODELSTORE_OFFLINE is set

A new source is a file that implements `source.Source`, a line in `sources_for`, and its form of writing in
`reference.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from modelstore.errors import HubUnavailable, SnapshotNotFound
from modelstore.fill.folder import FolderSource
from modelstore.fill.hf_cache import HfCacheSource
from modelstore.fill.source import Resolved, Source
from modelstore.reference import Reference, is_local
from modelstore.settings import Settings


def sources_for(
    reference: Reference,
    settings: Settings,
    *,
    named: Reference | None = None,
    copies: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Source]:
    """The sources that may have the model, in the order in which they are asked; no alias.

    `named`: the reference as the caller gave it, if `reference` was pinned to a commit since. `copies`: HF caches are
    among them.
    """
    from modelstore.fill.hub import HubSource  # its imports are for a miss alone

    if reference.kind == "file":
        yield FolderSource(reference)
        return
    for cache in settings.hf_caches if copies else ():
        yield HfCacheSource(cache, reference, settings, named=named)
    if not settings.offline:
        yield HubSource(reference, settings, sleep=sleep)


def resolve(
    reference: Reference,
    settings: Settings,
    *,
    recorded_commit: str,
    refresh: bool,
    copies: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Source, Resolved]:
    """The first source that has the model, and its commit: the one that the fleet recorded, or the Hub's if `refresh`.

    If the Hub cannot be reached, an HF cache on the volume may answer a `refresh`, too.

    Raises SnapshotNotFound if no source is left to ask, and the errors of the last source.
    """
    from modelstore.fill.hub import HubSource

    commit = "" if reference.kind == "file" else recorded_commit
    hub: tuple[Source, Resolved] | None = None
    unreachable: HubUnavailable | None = None
    if refresh and not settings.offline and reference.kind == "hub" and not is_local(reference.name):
        newest = HubSource(reference, settings, sleep=sleep)
        try:
            hub = newest, newest.resolve()
            commit = hub[1].commit
        except HubUnavailable as error:
            unreachable = error
    pinned = replace(reference, revision=commit) if commit else reference
    for source in sources_for(pinned, settings, named=reference, copies=copies, sleep=sleep):
        if hub is not None and not source.is_copy:
            return hub
        if unreachable is not None and not source.is_copy:
            raise unreachable
        if (resolved := source.offer()) is not None:
            return source, resolved.for_revision(reference.revision) if commit else resolved
    raise SnapshotNotFound(
        f"{reference} is not in {settings.root} and MODELSTORE_OFFLINE (or HF_HUB_OFFLINE) is set: unset it "
        "to download the model"
    )
