#!/usr/bin/env python3
"""What torch.compile would give the text engine: tokens a second, and how long it takes before the first.

    python scripts/bench/compile.py [--write DOCUMENT]

SmolLM2 in float16 on the CPU, four prompts at once through transformers' own `generate`, each figure in a process of
its own: without it, with an empty cache of compiled code, and with the cache of the run before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.race import environment
from scripts.bench.sections import write_section

MODEL = HERE / ".cache" / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
CODE = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
prompts = AutoTokenizer.from_pretrained(sys.argv[1])(["The capital of France is"] * 4, return_tensors="pt")
if sys.argv[2] == "compiled":
    model.forward = torch.compile(model.forward, dynamic=True)
def seconds(tokens):
    began = time.perf_counter()
    model.generate(**prompts, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return time.perf_counter() - began
with torch.inference_mode():
    print("RESULT", seconds(8), *(4 * 48 / seconds(48) for _run in range(3)))
"""


def measured(how: str, cache: str) -> str:
    """A row's figures: seconds of the first answer, and tokens a second afterwards."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", CODE, MODEL, how], env=env, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    first, *rates = map(float, line.split()[1:])
    return f"{first:.1f} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    lines = ["Measured by `python scripts/bench/compile.py`:", environment(HERE) + ".", ""]
    lines += ["| | the first 8 tokens, s | tokens a second afterwards |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as cache:
        for label, how in (
            ("as it is", "eager"),
            ("`torch.compile`, nothing compiled before", "compiled"),
            ("`torch.compile`, with the code of the run before", "compiled"),
        ):
            lines.append(f"| {label} | {measured(how, cache)} |")
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(options.write, "bench/compile.py", text)


if __name__ == "__main__":
    main()
