"""The plan of a fill: the files, the storage policy of each folder, and their sizes. Writes nothing.

The dry run and the fill make the same plan, so that they cannot differ; each brings its own way to read a small file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.fill.components import ReadFile
from modelstore.fill.footprint import Footprint, footprint_of, named_dtype
from modelstore.fill.repo_files import folder_of, join, parse_object
from modelstore.fill.request import FillRequest
from modelstore.fill.selection import Selection, select_files
from modelstore.fill.source import SourceFile
from modelstore.fill.storage_policy import QUANTIZATION_FILES, StoragePolicy, storage_policy
from modelstore.settings import Settings
from modelstore.volume.header import Header


def config_path(folder: str) -> str:
    """The path of a folder's config in a repo; the folder is empty for the repo's root."""
    return join(folder, "config.json")


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """The plan for one commit. `configs` and `policies`: by the folder of the weights beside them."""

    selection: Selection
    configs: Mapping[str, Mapping[str, Any]]
    policies: Mapping[str, StoragePolicy]
    footprint: Footprint

    def policy_of(self, path: str) -> StoragePolicy:
        """The storage policy of a weights file."""
        return self.policies[folder_of(path)]

    def with_headers(self, headers: Mapping[str, Header]) -> CheckpointPlan:
        """The plan once these headers are known, by the paths of the weights in the snapshot."""
        policies = {
            folder: policy.for_tensors(
                tensor for path, header in headers.items() if folder_of(path) == folder for tensor in header.tensors
            )
            for folder, policy in self.policies.items()
        }
        return replace(self, policies=policies)

    def with_unloaded(self, folder: str, names: frozenset[str]) -> CheckpointPlan:
        """The plan once these tensors of a folder are known to overflow, and to be loaded by no class."""
        policy = self.policies[folder]
        return replace(self, policies={**self.policies, folder: replace(policy, unloaded=policy.unloaded | names)})

    @property
    def stored_unchanged(self) -> str:
        """Why weights are stored as they come, for the manifest; empty if none are."""
        return "; ".join(sorted({policy.unchanged_because for policy in self.policies.values()} - {""}))

    @property
    def sizes_are_known(self) -> bool:
        """Whether each config names the dtype of its weights, so that the footprint is more than an upper bound."""
        return all(named_dtype(config) for config in self.configs.values())


def select(request: FillRequest, read: ReadFile, settings: Settings) -> tuple[tuple[SourceFile, ...], Selection]:
    """All files of the commit, and those that its snapshot needs. Reads indexes with `read`.

    Raises the errors of `select_files`: NoWeights, Refused, and so on.
    """
    files = request.source.list_files(request.resolved)
    selection = select_files(
        files,
        read,
        repo_id=request.key.repo_id,
        pickles=settings.allow_pickle,
        code=request.code,
        variant=DTYPES[request.dtype].file_variant,
        adapter=request.dtype == "keep",
    )
    return files, selection


def plan_checkpoint(request: FillRequest, selection: Selection, read: ReadFile) -> CheckpointPlan:
    """The plan for the selected files. Reads each config beside weights with `read`, as the source has it.

    Raises BadSafetensors for a config that is not JSON.
    """
    small = {file.path: file for file in selection.small}
    configs: dict[str, Mapping[str, Any]] = {}
    policies: dict[str, StoragePolicy] = {}
    for folder in sorted({folder_of(file.path) for file in selection.weights}):
        file = small.get(config_path(folder))
        configs[folder] = parse_object(read(file), file.path) if file is not None else {}
        beside = {name: small[path] for name in QUANTIZATION_FILES if (path := join(folder, name)) in small}
        others = {name: parse_object(read(each), each.path) for name, each in beside.items()}
        names = (name for path, tensors in selection.indexes.items() if folder_of(path) == folder for name in tensors)
        policies[folder] = storage_policy(request.dtype, configs[folder], others).for_names(names)
    return CheckpointPlan(
        selection, configs, policies, footprint_of(selection, configs, policies, compressed=request.compressed)
    )


def preview(request: FillRequest, settings: Settings) -> CheckpointPlan:
    """The plan of a fill that is not begun; reads indexes and configs from the source."""

    @cache
    def read(file: SourceFile) -> bytes:
        return request.source.read(request.resolved, file)

    _files, selection = select(request, read, settings)
    return plan_checkpoint(request, selection, read)
