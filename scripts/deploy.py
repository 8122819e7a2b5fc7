#!/usr/bin/env python3
"""Create an endpoint on RunPod, or bring the one of that name up to date; again and again is fine.

    RUNPOD_API_KEY=… python scripts/deploy.py chat --image you/modelstore-worker --model org/name --volume VOLUME_ID \\
        --gpu ADA_24,AMPERE_24 --preset cost [--http] [--env NAME=VALUE]… [--dry-run | --plan]
    RUNPOD_API_KEY=… python scripts/deploy.py chat --model org/other [--env NAME=VALUE]… [--unset NAME]…
    RUNPOD_API_KEY=… python scripts/deploy.py up models.toml --name chat --image you/modelstore-worker \\
        --data-center EU-RO-1 [the same options]…
    RUNPOD_API_KEY=… python scripts/deploy.py down chat [--keep-volume]

A second run changes what it names, and nothing else; it prints the differences. --http makes an endpoint of the type
LOAD_BALANCER, whose workers are asked over HTTP, without a queue. Workers run in the data centers of the volumes.

`up` makes all that a list of models needs: a network volume, the models on it, the endpoint, and a first job, whose
answer it prints. If it is interrupted, run it again. `down` asks, and removes them.
Presets (figures for a 7B model; each can be overridden):

    dev      0 to 1 workers,  idle 30 s,  jobs up to 300 s
    latency  2 to 10 workers, idle 120 s, jobs up to 60 s
    cost     0 to 5 workers,  idle 60 s,  jobs up to 300 s, FlashBoot
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from modelstore.errors import InvalidSetting, ModelStoreError, UsageError
from scripts.deployment import Deployment
from scripts.endpoint import create_or_update, curl_of, url_of
from scripts.endpoint_plan import CUDA, PRESETS, SERVE_HTTP, Plan, check_environment, make_plan
from scripts.runpod_api import Api, Unreachable

_AS_NEW = "whether the endpoint is there is not known; this is the plan for a new one"


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text.partition('=')[0]!r} is not NAME=VALUE")
    return name, value


def _list(text: str) -> list[str]:
    return list(filter(None, map(str.strip, text.split(","))))


def _parsed() -> argparse.Namespace:
    command = sys.argv[1] if sys.argv[1:2] in (["up"], ["down"]) else "endpoint"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=command)
    if command != "endpoint":
        parser.add_argument("command", choices=["up", "down"], help=argparse.SUPPRESS)
    if command == "down":
        parser.add_argument("name", help="the name that `up` had")
        parser.add_argument("--keep-volume", action="store_true", help="and all models on it")
        parser.add_argument("--yes", action="store_true", help="do not ask")
        return parser.parse_args()
    if command == "up":
        parser.add_argument("list", type=Path, help="a TOML file, as for `modelstore seed --from`")
        parser.add_argument("--name", help="of the endpoint, the volume and the pod; the list's by default")
        parser.add_argument("--data-center", metavar="ID", help="of a new volume")
        parser.add_argument("--volume-size", type=int, metavar="GB", help="instead of the size that the list needs")
        parser.add_argument(
            "--seed",
            choices=["pod", "s3", "none"],
            help="by a pod without a GPU, or from here over S3, which is done if AWS_ACCESS_KEY_ID is set",
        )
        parser.add_argument("--seed-cpu", default="cpu5c", metavar="FLAVOR", help="of that pod; %(default)s")
        parser.add_argument("--seed-wait-s", type=float, default=7200, metavar="S", help="for the seed; %(default)s")
        parser.add_argument("--wait-s", type=float, default=1800, metavar="S", help="for the answer; %(default)s")
    else:
        parser.add_argument("name", help="the endpoint's name")
        plan = parser.add_mutually_exclusive_group()
        plan.add_argument("--dry-run", action="store_true", help="print the request, and do nothing; needs no key")
        plan.add_argument("--plan", action="store_true", help="the same, compared with what is deployed")
    _add_options(parser)
    return parser.parse_args()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", help="the image, as it was pushed")
    parser.add_argument("--model", help="org/name, org/name@revision or @alias")
    parser.add_argument("--volume", type=_list, help="the network volume's id; several in several data centers")
    parser.add_argument(
        "--http", action="store_true", help="HTTP without a queue: an endpoint of the type LOAD_BALANCER"
    )
    parser.add_argument("--gpu", type=_list, help="pools of GPUs; ADA_24,AMPERE_24 for a new endpoint")
    parser.add_argument(
        "--exclude-gpu", type=_list, metavar="TYPES", help="types of GPUs in these pools that are not used"
    )
    parser.add_argument("--gpu-count", type=int, help="for each worker; 1 for a new endpoint")
    parser.add_argument(
        "--cuda", metavar="VERSION", help=f"the lowest version of CUDA that a host may have; {CUDA} for a new endpoint"
    )
    parser.add_argument("--preset", choices=PRESETS, help="cost for a new endpoint")
    for name in ("workers-min", "workers-max", "idle-timeout", "execution-timeout"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    scaling = parser.add_mutually_exclusive_group()
    scaling.add_argument(
        "--queue-delay", type=float, metavar="S", help="more workers if jobs wait so long; 4 s by default"
    )
    scaling.add_argument("--request-count", type=int, metavar="N", help="so many requests for a worker; 4 with --http")
    parser.add_argument("--flashboot", action="store_true", help="FlashBoot, also if the preset has none")
    parser.add_argument("--disk", type=int, help="GB of the container, 20 for a new endpoint; no model goes there")
    parser.add_argument("--args", help=f"the container's command; {SERVE_HTTP!r} with --http")
    parser.add_argument("--registry", metavar="ID", help="the credential of a private registry")
    parser.add_argument("--locations", type=_list, help="data centers; the volumes' by default")
    parser.add_argument(
        "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker"
    )
    parser.add_argument("--unset", action="append", default=[], metavar="NAME", help="remove a setting of the worker")


def _api(*, may_lack_key: bool) -> Api | None:
    """The account; None for a dry run that has no key."""
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if key and not key.isascii():
        raise InvalidSetting("RUNPOD_API_KEY is no key of RunPod's: copy it from its settings")
    if key:
        return Api(key)
    if may_lack_key:
        print(f"RUNPOD_API_KEY is not set: {_AS_NEW}", file=sys.stderr)
        return None
    raise InvalidSetting("RUNPOD_API_KEY is not set: make a key in RunPod's settings")


def _planned(options: argparse.Namespace, api: Api | None) -> Plan:
    try:
        return make_plan(options, api)
    except Unreachable as error:
        if not options.dry_run:
            raise
        print(f"{error}: {_AS_NEW}", file=sys.stderr)
        return make_plan(options, None)


def main() -> int:
    options = _parsed()
    try:
        record = _deployed(options) if options.command == "endpoint" else _up_or_down(options)
    except ModelStoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: what was made is there; repeat the command to go on", file=sys.stderr)
        return 130
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def _deployed(options: argparse.Namespace) -> dict[str, Any]:
    changes = not (options.dry_run or options.plan)
    api = _api(may_lack_key=options.dry_run)
    plan = _planned(options, api)
    if api is not None or options.model:  # else it may be a plan without a model
        check_environment(plan.endpoint["env"])
    for line in list(plan.differences()) or ["nothing changes"]:
        print(line, file=sys.stderr)
    record: dict[str, Any] = {"done": changes, **plan.as_json()}
    if changes and api is not None:
        endpoint = create_or_update(api, plan.before, plan.body())
        record |= {"id": endpoint["id"], "url": url_of(endpoint)}
        print(f"the endpoint is {record['url']}; a first job:\n{curl_of(endpoint)}", file=sys.stderr)
    return record


def _up_or_down(options: argparse.Namespace) -> dict[str, Any]:
    name = options.name or options.list.stem
    if name in ("up", "down"):
        raise UsageError(f"{name} is no name for an endpoint, but a command: choose another --name")
    api = _api(may_lack_key=False)
    assert api is not None
    deployment = Deployment(api, name, os.environ["RUNPOD_API_KEY"].strip())
    if options.command == "up":
        options.name = name
        return deployment.up(options.list, options)
    return {"removed": deployment.down(confirm=_agreed if options.yes else _confirm, keep_volume=options.keep_volume)}


def _agreed(_question: str) -> None:
    """--yes."""


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here: repeat the command with --yes")
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed")


if __name__ == "__main__":
    sys.exit(main())
