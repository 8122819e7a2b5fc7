"""A list of models on RunPod, in one go: a network volume, its models, an endpoint, and a first job; and its end.

    deployment = Deployment(api, "chat", key)
    deployment.up(models, options)          looks first at each step: a second run goes on where one broke off
    deployment.down(confirm=ask)            removes what has this name: endpoint, pod and volume

A volume is filled from this machine over S3, or by a pod without a GPU that runs the worker's image beside it. The pod
does not end by itself, because RunPod would start its container again: it says how the seed ended, and is removed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstore.errors import ModelStoreError, UsageError
from modelstore.operate.seed_list import ListedModel, read_list
from modelstore.operate.seed_plan import SeedPlan
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.units import size
from scripts.endpoint import create_or_update, endpoint_of_name, url_of
from scripts.endpoint_plan import Plan, check_options, environment, make_plan
from scripts.first_job import NoAnswer, first_answer, tell
from scripts.runpod_api import Api, InUse, Unreachable

_MOUNT = "/runpod-volume"
_SPARE = 1.1  # of the bytes that the models take, and of those that the largest takes while it is made
_SMALLEST_GB = 10  # of a volume
_SEED = (
    """sh -c 'printf %s "$SEED_LIST" >/tmp/models.toml; modelstore seed --from /tmp/models.toml --yes; """
    """echo "the seed has ended with exit code $?"; sleep infinity'"""
)
_SEED_END = re.compile(r"the seed has ended with exit code (\d+)")
_OVER = ("EXITED", "ERROR", "TERMINATED")
_EVERY_S = 1.0
_DETACH_S = 120.0


class SeedFailed(ModelStoreError):
    """Not all models of the list are on the volume."""

    exit_code = 3


class Deployment:
    """What has one name on an account: a volume, a pod that fills it, and an endpoint."""

    def __init__(self, api: Api, name: str, key: str) -> None:
        self._api = api
        self._name = name
        self._key = key

    def up(self, models: Path, options: argparse.Namespace) -> dict[str, Any]:
        """Make all that is missing; returns the answer of the first job, with what was made. `options`: of the command
        line. Raises ModelStoreError; what is there by then stays, and the next run goes on with it."""
        listed = read_list(models)
        before = endpoint_of_name(self._api, self._name)
        _name_model(options, listed[0], before)
        if before and before.get("image") != options.image and options.image:
            raise UsageError(
                f"the endpoint {self._name} runs another image ({before.get('image')}): choose another --name, or "
                f"change it first: scripts/deploy.py {self._name} --image {options.image}"
            )
        if not options.image and not before:
            raise UsageError(f"there is no endpoint {self._name} yet, and a new one needs --image")
        if not options.volume and (attached := before.get("networkVolumes")):
            options.volume = list(attached)
        if options.volume and len(options.volume) > 1:
            raise UsageError(
                f"{self._name} has {len(options.volume)} volumes: name the one to fill with --volume, or seed "
                "them with `modelstore seed --from … --to …` and update the endpoint with `deploy.py NAME`"
            )
        check_options(options, before)
        needed_gb = options.volume_size or _needed_gb(listed)
        volume = self._volume(options, needed_gb)
        self._seed(volume, models, options, before)
        options.volume = [volume["id"]]
        plan = make_plan(options, self._api)
        for line in plan.differences():
            tell(line)
        endpoint = self._saved(plan)
        answer = first_answer(self._api, endpoint, self._key, options.wait_s)
        return {"volume": volume["id"], "endpoint": endpoint["id"], "url": url_of(endpoint), "answer": answer}

    def down(self, *, confirm: Callable[[str], None], keep_volume: bool = False) -> list[str]:
        """Remove the endpoint, the pod and the volume; returns what is gone. `confirm` raises if a person does not
        agree to its question."""
        endpoint = endpoint_of_name(self._api, self._name)
        pods = [pod for pod in self._pods() if pod["status"] != "TERMINATED"]
        volumes = [] if keep_volume else [each for each in self._volumes() if each["name"] == self._name]
        if len(volumes) > 1:  # names are not unique
            attached = endpoint.get("networkVolumes") or ()
            volumes = [each for each in volumes if each["id"] in attached]
            if not volumes:
                raise UsageError(
                    f"several volumes have the name {self._name}: use --keep-volume, and remove them by id"
                )
        things = [f"the endpoint {self._name}"] if endpoint else []
        things += [f"the pod {pod['name']}" for pod in pods]
        for volume in volumes:
            if user := self._other_user(volume["id"], endpoint, pods):
                raise UsageError(f"the {user} uses the volume {volume['id']}, too: leave it with --keep-volume")
            things.append(
                f"the volume {volume['name']} ({volume['id']}, {volume['size']} GB in {volume['dataCenter']}) "
                "and all on it"
            )
        if not things:
            tell(f"nothing here has the name {self._name}")
            return []
        confirm(f"Remove {' and '.join(things)}?")
        if endpoint:
            self._api.delete(f"/v2/serverless/{endpoint['id']}")
        for pod in pods:
            self._api.delete(f"/v2/pods/{pod['id']}")
        if (endpoint or pods) and volumes:
            tell("the endpoint and the pod are removed; the volume follows")
        for volume in volumes:
            self._delete_volume(volume["id"], may_be_held=bool(endpoint or pods))
        return things

    # The volume

    def _volumes(self) -> list[dict[str, Any]]:
        return list(self._api.get("/v2/network-volumes")["networkVolumes"])

    def _volume(self, options: argparse.Namespace, needed_gb: int) -> Mapping[str, Any]:
        """The volume of this name, or the one that was named; made, or made larger, if it has to be."""
        place = options.data_center
        if options.volume:
            named = [each for each in self._volumes() if [each["id"]] == options.volume]
            if not named:
                raise UsageError(f"there is no one volume {', '.join(options.volume)}: without --volume one is made")
        else:
            named = [each for each in self._volumes() if each["name"] == self._name]
        if len(named) > 1:
            ids = ", ".join(each["id"] for each in named)
            raise UsageError(f"there are {len(named)} volumes of the name {self._name}: name one with --volume ({ids})")
        if not named:
            return self._new_volume(place, needed_gb)
        (volume,) = named
        if place and place != volume["dataCenter"]:
            raise UsageError(
                f"the volume {volume['id']} is in {volume['dataCenter']}, not in {place}: leave --data-center out, or "
                "choose another --name"
            )
        if volume["size"] < needed_gb:
            tell(f"the volume {volume['id']} grows from {volume['size']} to {needed_gb} GB")
            return dict(self._api.patch(f"/v2/network-volumes/{volume['id']}", {"size": needed_gb}))
        tell(
            f"the volume {volume['id']} is there: {volume['size']} GB in {volume['dataCenter']}; the models need "
            f"{needed_gb} GB of it, beside what else it holds"
        )
        return dict(volume)

    def _new_volume(self, place: str | None, needed_gb: int) -> Mapping[str, Any]:
        centers = self._api.get("/v2/catalog/datacenters")["dataCenters"]
        having = [center["id"] for center in centers if center["networkVolumeTypes"]]
        if place not in having:
            given = f"{place} has no network volumes" if place else "a new volume needs a place"
            raise UsageError(f"{given}: choose --data-center out of {', '.join(having)}")
        tell(f"a volume of {needed_gb} GB is made in {place}")
        body = {"name": self._name, "size": needed_gb, "dataCenter": place}
        return dict(self._api.post("/v2/network-volumes", body))

    def _other_user(self, volume_id: str, endpoint: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> str:
        """Another endpoint or pod that has the volume; empty if there is none."""
        for pod in self._api.get("/v2/pods")["pods"]:
            if pod["id"] not in [each["id"] for each in own] and volume_id in _mounted(pod):
                return f"pod {pod['name']}"
        for other in self._api.get("/v2/serverless")["endpoints"]:
            if other["id"] != endpoint.get("id") and volume_id in (other.get("networkVolumes") or ()):
                return f"endpoint {other['name']}"
        return ""

    def _delete_volume(self, volume_id: str, *, may_be_held: bool) -> None:
        """Remove a volume. `may_be_held`: workers that were removed just now may have it for a while."""
        deadline = time.monotonic() + (_DETACH_S if may_be_held else 0.0)
        told = False
        while True:
            try:
                return self._api.delete(f"/v2/network-volumes/{volume_id}")
            except InUse as error:
                if time.monotonic() > deadline:
                    raise UsageError(f"{error}; the volume {volume_id} is left: run this again in a minute") from error
                if not told:
                    tell(f"{error}; this command tries again for up to {_DETACH_S:.0f} s")
                    told = True
            time.sleep(_EVERY_S)

    # The models

    def _seed(
        self, volume: Mapping[str, Any], models: Path, options: argparse.Namespace, before: Mapping[str, Any]
    ) -> None:
        """Put the list's models on the volume. Raises SeedFailed if one is not there then."""
        way = options.seed or ("s3" if os.environ.get("AWS_ACCESS_KEY_ID") else "pod")
        if way == "none":
            return
        if way == "s3":
            target = f"s3://{volume['id']}@{volume['dataCenter']}"
            tell(f"the models go to {target} from here")
            command = [sys.executable, "-m", "modelstore", "seed", "--from", str(models), "--to", target, "--yes"]
            code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
        else:
            pod = self._seeding_pod(volume, models, options, before)
            try:
                code = self._end_of_seed(pod, options.seed_wait_s)
            except (UsageError, SeedFailed):
                self._api.delete(f"/v2/pods/{pod['id']}")
                raise
            self._api.delete(f"/v2/pods/{pod['id']}")
        if code:
            raise SeedFailed(
                f"the list is not all on the volume {volume['id']} (`modelstore seed` ended with {code}, see above): "
                "mend it and run this again"
            )

    def _pods(self) -> list[dict[str, Any]]:
        """The pods that an `up` of this name has made."""
        pods = self._api.get("/v2/pods")["pods"]
        return [pod for pod in pods if pod["name"] == self._pod_name and "SEED_LIST" in pod["env"]]

    @property
    def _pod_name(self) -> str:
        return f"{self._name}-seed"

    def _seeding_pod(
        self, volume: Mapping[str, Any], models: Path, options: argparse.Namespace, before: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The pod that fills the volume with this list: the one of a run that broke off, or a new one."""
        root = environment(options, before).get("MODELSTORE_ROOT", f"{_MOUNT}/modelstore")
        env = {"SEED_LIST": models.read_text(), "MODELSTORE_ROOT": root}
        env |= {name: value for name in ("HF_TOKEN", "HF_ENDPOINT") if (value := os.environ.get(name))}
        body = {
            "name": self._pod_name,
            "image": options.image or before["image"],
            "args": _SEED,
            "disk": 20,
            "env": env,
            "cpu": {"id": options.seed_cpu, "vcpuCount": 4},
            "mounts": {"network": [{"volumeId": volume["id"], "path": _MOUNT}]},
            "dataCenterIds": [volume["dataCenter"]],
        }
        if options.registry:
            body["registry"] = options.registry
        for pod in self._pods():
            is_same = all(pod.get(name) == body[name] for name in ("image", "args", "env", "mounts"))
            if is_same and pod["status"] not in _OVER:
                tell(f"the pod {pod['id']} is at it already")
                return dict(pod)
            self._api.delete(f"/v2/pods/{pod['id']}")
        pod = self._api.post("/v2/pods", body)
        tell(f"the pod {pod['id']} seeds the volume; it is billed until this command has removed it, or `down` has")
        return dict(pod)

    def _end_of_seed(self, pod: Mapping[str, Any], wait_s: float) -> int:
        """Show the pod's log until the seed has ended; returns its exit code."""
        path, deadline = f"/v2/pods/{pod['id']}", time.monotonic() + wait_s
        log = self._api.log(f"{path}/logs")
        while time.monotonic() < deadline:
            for line in log.lines():
                if (match := _SEED_END.search(line)) is not None:
                    return int(match[1])
                tell(f"{pod['name']}: {line}")
                if time.monotonic() > deadline:
                    break
            try:
                status = self._api.get(path)["status"]
            except Unreachable as error:
                tell(f"{error}; the pod {pod['id']} goes on")
            else:
                if status in _OVER:
                    raise SeedFailed(f"the pod {pod['id']} has ended ({status}) before the seed: run this again")
            time.sleep(_EVERY_S)
        raise NoAnswer(
            f"the seed has not ended in {wait_s:.0f} s: the pod {pod['id']} goes on; run this again, or `down`"
        )

    # The endpoint

    def _saved(self, plan: Plan) -> Mapping[str, Any]:
        endpoint = create_or_update(self._api, plan.before, plan.body())
        tell(f"the endpoint is {url_of(endpoint)}")
        return endpoint


def _mounted(pod: Mapping[str, Any]) -> list[str]:
    """The ids of a pod's network volumes."""
    return [mount["volumeId"] for mount in (pod.get("mounts") or {}).get("network") or []]


def _name_model(options: argparse.Namespace, first: ListedModel, before: Mapping[str, Any]) -> None:
    """Serve the first model of the list, unless the command line names another."""
    if options.model:
        return
    options.model = f"@{first.aliases[0]}" if first.aliases else str(first.reference)
    if "MODEL_DTYPE" in dict(options.env) or "MODEL_DTYPE" in options.unset:
        return
    if first.dtype and not first.aliases:
        options.env.append(("MODEL_DTYPE", first.dtype))
    elif "MODEL_DTYPE" in (before.get("env") or {}):
        options.unset.append("MODEL_DTYPE")  # of a former list


def _needed_gb(listed: Sequence[ListedModel]) -> int:
    """The size of a volume that holds these models, in GB. Asks the Hub, and raises if it lacks one of them."""
    with tempfile.TemporaryDirectory(prefix="deploy-") as folder:
        root = Path(folder)
        store = ModelStore(root, settings=Settings.from_env(dict(os.environ) | {"MODELSTORE_ROOT": folder}, root=root))
        preview = SeedPlan(store, listed).preview()
    for record in preview.models:
        if "error" in record:
            raise SeedFailed(f"{record['error']}; nothing was made on RunPod")
    needed = preview.taken_after + preview.peak_bytes
    tell(f"the models take {size(preview.taken_after)}")
    return max(_SMALLEST_GB, math.ceil(_SPARE * needed / 1e9))
