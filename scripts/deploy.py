#!/usr/bin/env python3
"""Create an endpoint on RunPod, or bring the one of that name up to date; again and again is fine.

    RUNPOD_API_KEY=… python scripts/deploy.py chat --image you/modelstore-worker --model org/name --volume VOLUME_ID \\
        --gpu ADA_24,AMPERE_24 --preset cost [--http] [--env NAME=VALUE]… [--dry-run | --plan]
    RUNPOD_API_KEY=… python scripts/deploy.py chat --model org/other [--env NAME=VALUE]… [--unset NAME]…

A second run changes what it names, and nothing else; it prints the differences. --http makes an endpoint of the type
LOAD_BALANCER, whose workers are asked over HTTP, without a queue. Workers run in the data centers of the volumes.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

from modelstore.errors import InvalidSetting, ModelStoreError, UsageError
from modelstore.settings import Settings, ineffective
from scripts.endpoint_plan import PRESETS, SERVE_HTTP, Plan, curl_of, make_plan, save, url_of
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the endpoint's name")
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
    parser.add_argument("--cuda", metavar="VERSION", help="the lowest version of CUDA that a host may have, as in 12.8")
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
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument("--dry-run", action="store_true", help="print the request, and do nothing; needs no key")
    plan.add_argument("--plan", action="store_true", help="the same, compared with what is deployed")
    return parser.parse_args()


def _api(options: argparse.Namespace) -> Api | None:
    """The account; None for a dry run that has no key."""
    key = os.environ.get("RUNPOD_API_KEY", "")
    if key:
        return Api(key)
    if options.dry_run:
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
    changes = not (options.dry_run or options.plan)
    try:
        api = _api(options)
        plan = _planned(options, api)
        env = plan.endpoint["env"]
        if Settings.from_env(env, root=Path("/volume")).model is None and plan.before:
            raise UsageError("the environment has no MODEL_ID then, and no worker could start: name one with --model")
        for line in ineffective(env):
            print(f"warning: {line}", file=sys.stderr)
        for line in list(plan.differences()) or ["nothing changes"]:
            print(line, file=sys.stderr)
        record = {"done": changes, **plan.as_json()}
        if changes and api is not None:
            endpoint = save(plan, api)
            record |= {"id": endpoint["id"], "url": url_of(endpoint)}
    except ModelStoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(record, indent=2, ensure_ascii=False))
    if changes:
        print(f"the endpoint is {record['url']}; a first job:\n{curl_of(endpoint)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
