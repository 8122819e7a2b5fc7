#!/usr/bin/env python3
"""Every model class of transformers through the store, ten minutes on two cores.

    python scripts/dev/conformance.py --write docs/conformance.md
    python scripts/dev/conformance.py --sample 60 [--seed N]        a few of them, chosen by a seed that is printed
    python scripts/dev/conformance.py --only LlamaForCausalLM

Each class that the Auto classes know is built tiny and random in float32, with its optional parts switched on, saved by
`save_pretrained`, seeded, and loaded with `load_model`. Every parameter and every buffer, stored or computed, is then
compared with `from_pretrained(original, dtype=float16)`: names, dtypes, bits. It fails if one differs. Classes that
transformers itself cannot build here, or cannot load again, are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path[:0] = [str(HERE), str(Path(__file__).parent)]

import torch
import transformers
from tiny_models import MOST_PARAMETERS, class_named, loadable_classes, tiny_configs, with_another_rope
from transformers import PreTrainedConfig, PreTrainedModel

from modelstore import ModelStore, load_model
from modelstore.settings import Settings

DTYPE = torch.float16
_BEGIN, _END = "<!-- conformance -->", "<!-- /conformance -->"
_LIMIT_S = 240.0
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome for one class: `status` is equal, different or unbuildable; `detail` says which tensors, or why."""

    name: str
    status: str
    detail: str
    configurations: int
    tensors: int
    seconds: float


def try_class(name: str) -> Outcome:
    """Send one class through the store, in each of its configurations."""
    began = time.monotonic()
    configurations = tensors = 0

    def outcome(status: str, detail: str = "") -> Outcome:
        return Outcome(name, status, detail, configurations, tensors, round(time.monotonic() - began, 2))

    try:
        cls = class_named(name)
        configs = list(tiny_configs(cls))
        configs += filter(None, [with_another_rope(cls, configs[0])])
    except Exception as error:
        return outcome("unbuildable", _line(error))
    for config in configs:
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            try:
                reference = _reference(cls, config, Path(folder) / "model")
            except RuntimeError as error:
                if configurations:
                    continue  # another kind of position embedding than the class has
                return outcome("unbuildable", str(error))
            try:
                store = ModelStore(Path(folder) / "store", settings=Settings(root=Path(folder) / "store"))
                ours = load_model(store.ensure(f"file://{folder}/model", dtype="float16"), device="cpu")
            except Exception as error:
                return outcome("different", _line(error))
            configurations += 1
            tensors += len(list(_tensors(ours)))
            if different := differences(ours, reference):
                again = cls.from_pretrained(Path(folder) / "model", dtype=DTYPE)
                if unsteady := differences(again, reference):
                    return outcome("unbuildable", f"from_pretrained gives other bits each time: {unsteady[0]}")
                return outcome("different", "; ".join(different[:_SHOWN]))
    return outcome("equal")


def _reference(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Save a random model of the class in `folder`; returns what `from_pretrained` makes of it in float16.

    Raises RuntimeError if transformers cannot build the class, save it, or load what it saved.
    """
    torch.manual_seed(0)
    try:
        config.save_pretrained(folder)
        model = cls(cls.config_class.from_pretrained(folder))
        with torch.no_grad():
            for _name, tensor in _tensors(model):
                if tensor.is_floating_point():
                    tensor.uniform_(-1, 1)
        model.eval().save_pretrained(folder)
        reference, info = cls.from_pretrained(folder, dtype=DTYPE, output_loading_info=True)
    except Exception as error:
        raise RuntimeError(_line(error)) from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:_SHOWN])
        raise RuntimeError(f"save_pretrained leaves out {names}, which from_pretrained then makes at random")
    return reference


def differences(ours: PreTrainedModel, reference: PreTrainedModel) -> list[str]:
    """How one model differs from another: its class, and the names, dtypes, shapes and bits of its tensors."""
    different = []
    if type(ours) is not type(reference):
        different.append(f"class {type(ours).__name__}, not {type(reference).__name__}")
    tensors, expected = dict(_tensors(ours)), dict(_tensors(reference))
    different += [f"{name} is in one alone" for name in sorted(tensors.keys() ^ expected.keys())]
    for name in sorted(tensors.keys() & expected.keys()):
        tensor, other = tensors[name], expected[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            different.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {other.dtype} {list(other.shape)}")
        elif not torch.equal(_bits(tensor), _bits(other)):
            different.append(f"{name} has other bits")
    return different


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.detach()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def _prepare() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"


def sweep(names: list[str], processes: int) -> Iterator[Outcome]:
    """The outcomes for these classes, as they come; a class that ends its process or takes too long is unbuildable."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_prepare, maxtasksperchild=60) as pool:
        results = [(name, pool.apply_async(try_class, (name,))) for name in names]
        for name, result in results:
            try:
                yield result.get(timeout=_LIMIT_S)
            except multiprocessing.TimeoutError:
                yield Outcome(name, "unbuildable", f"it took more than {_LIMIT_S:.0f} s", 0, 0, _LIMIT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, help="this many classes, chosen at random; all if it is left out")
    parser.add_argument("--seed", type=int, default=None, help="of the choice; at random, and printed")
    parser.add_argument("--only", nargs="+", help="these classes")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every outcome, one a line")
    parser.add_argument("--write", type=Path, help="write the table to this page, between its marks")
    args = parser.parse_args()
    names = args.only or loadable_classes()
    if args.sample:
        seed = random.randrange(1 << 32) if args.seed is None else args.seed
        print(f"{args.sample} of {len(names)} classes, --seed {seed}")
        names = random.Random(seed).sample(names, args.sample)
    began, outcomes = time.monotonic(), []
    for outcome in sweep(names, args.processes):
        outcomes.append(outcome)
        if outcome.status != "equal":
            print(f"{outcome.status}: {outcome.name}: {outcome.detail}", flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    table = _table(outcomes, time.monotonic() - began)
    print(table.partition("\n\n")[0])
    if args.write:
        page = args.write.read_text()
        before, after = page.partition(_BEGIN)[0], page.partition(_END)[2]
        args.write.write_text(f"{before}{_BEGIN}\n{table}{_END}{after}")
    return int(not outcomes or any(outcome.status == "different" for outcome in outcomes))


def _table(outcomes: list[Outcome], seconds: float) -> str:
    """The counts, and every class that was not compared or differs, by reason."""
    counts = Counter(outcome.status for outcome in outcomes)
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, {os.cpu_count()} processors: "
        f"{len(outcomes)} classes tried, {counts['equal']} equal, {counts['different']} different, "
        f"{counts['unbuildable']} not buildable; {sum(outcome.configurations for outcome in outcomes)} configurations, "
        f"{sum(outcome.tensors for outcome in outcomes)} tensors compared, {seconds:.0f} s",
        "",
        "| not compared, or different | why |",
        "|---|---|",
    ]
    by_reason: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status != "equal":
            by_reason.setdefault(_reason(outcome), []).append(outcome.name)
    lines += [
        f"| {', '.join(names)} | {reason} |"
        for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return "\n".join(lines) + "\n"


def _reason(outcome: Outcome) -> str:
    """The reason without the parts that differ from class to class."""
    if match := re.search(r"requires the (\w+) library|No module named '(\w+)'", outcome.detail):
        return f"{match[1] or match[2]} is not installed"
    text = re.sub(r"/\S+/", "", outcome.detail).replace("|", "/")
    text = re.sub(r"has \d+ M parameters", f"has more than {MOST_PARAMETERS / 1e6:.0f} M parameters", text)
    return text[:160] if outcome.status == "unbuildable" else f"**different**: {text}"


if __name__ == "__main__":
    sys.exit(main())
