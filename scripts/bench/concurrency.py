#!/usr/bin/env python3
"""Tokens a second with one, four and sixteen jobs at once, against one job at a time.

    python scripts/bench/concurrency.py [--tokens 64] [--runs 3] [--dtypes float16,bfloat16] [--write DOCUMENT]

The real SmolLM2-135M-Instruct, loaded from a store of its own; prompts of different lengths, greedy. One at
a time is a plain handler: `model.generate` for each job. Beside our batcher runs transformers' own
continuous batching over the same prompts, all known beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

import torch
from transformers import GenerationConfig

from handler.engines.text import TextEngine
from handler.jobs import Limits, parse_text
from modelstore.bench.race import environment
from modelstore.dtypes import Dtype, parse_dtype
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.warmstart import begin
from scripts.bench.sections import write_section

AT_ONCE = (1, 4, 16)
TOPICS = ("rivers", "a lighthouse keeper", "the history of bread", "how glass is made from sand and fire")


def prompts(count: int) -> list[str]:
    return [f"Write {'a long ' * (n % 3)}story about {TOPICS[n % len(TOPICS)]}, part {n}." for n in range(count)]


def ours(engine: TextEngine, count: int, tokens: int) -> int:
    async def one(prompt: str) -> int:
        request = parse_text(
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0}, Limits.of(Settings(root=Path("/")))
        )
        return sum([piece.tokens async for piece in engine.generate(request)])

    async def all_of_them() -> int:
        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts(count))))

    return asyncio.run(all_of_them())


def one_at_a_time(model: Any, tokenizer: Any, count: int, tokens: int) -> int:
    made = 0
    for prompt in prompts(count):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        made += output.shape[1] - inputs["input_ids"].shape[1]
    return made


def transformers_own(model: Any, tokenizer: Any, count: int, tokens: int) -> int:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    inputs = [tokenizer(prompt)["input_ids"] for prompt in prompts(count)]
    outputs = model.generate_batch(inputs, generation_config=config, progress_bar=False)
    return sum(len(output.generated_tokens) for output in outputs.values())


def rate(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    made = work()
    return made / (time.perf_counter() - began)


def measured(folder: Path, dtype: Dtype, tokens: int, runs: int) -> list[str]:
    """The table of one storage dtype."""
    settings = Settings(root=folder / "store", model=parse_reference(f"file://{folder}/model"), dtype=dtype)
    engine = begin(replace(settings, max_concurrency=max(AT_ONCE))).load(TextEngine.load)
    model, tokenizer = engine._loaded.model, engine._loaded.tokenizer
    ways: dict[str, Callable[[int], int]] = {
        "`model.generate`, one at a time": lambda n: one_at_a_time(model, tokenizer, n, tokens),
        "ours, at once": lambda n: ours(engine, n, tokens),
        "transformers' continuous batching": lambda n: transformers_own(model, tokenizer, n, tokens),
    }
    lines = [f"**{dtype}**", "", "| jobs | " + " | ".join(ways) + " | ours / one at a time |", "|---|---|---|---|---|"]
    for count in AT_ONCE:
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for run in range(runs + 1):
            for way, work in ways.items():
                found = rate(lambda work=work, count=count: work(count))
                print(f"{dtype}, {count} jobs, run {run}, {way}: {found:.1f} tokens/s", file=sys.stderr, flush=True)
                if run:
                    rates[way].append(found)
        base, mine, _theirs = rates.values()
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        cells = [f"{statistics.median(found):.1f} tokens/s" for found in rates.values()]
        lines.append(f"| {count} | {' | '.join(cells)} | {ratio:.2f} |")
    engine.close()
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="for each job")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", default="float16,bfloat16", help="storage dtypes, each measured")
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-concurrency-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, HERE / "scripts" / "dev" / "smollm2.py", folder / "model"], check=True)
        lines = []
        for dtype in options.dtypes.split(","):
            lines += measured(folder, parse_dtype("--dtypes", dtype), options.tokens, options.runs)
        place = environment(folder)
    given = f"--tokens {options.tokens} --runs {options.runs} --dtypes {options.dtypes}"
    text = f"Measured by `python scripts/bench/concurrency.py {given}`:\n{place}.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.write:
        write_section(options.write, "bench/concurrency.py", text)


if __name__ == "__main__":
    main()
