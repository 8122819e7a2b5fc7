#!/usr/bin/env python3
"""Write the table of fields in docs/client.md, and of worker-vllm's in docs/migrate.md, from the code:

python scripts/dev/field_table.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from handler.fields import FIELDS, NOT_STREAMED, Field

PAGE = HERE / "docs" / "client.md"
MIGRATION_PAGE = HERE / "docs" / "migrate.md"
_OF_WORKER_VLLM = re.compile(r"(?<=<!-- worker-vllm fields -->\n).*?(?=<!-- /worker-vllm fields -->)", re.DOTALL)
# The fields of worker-vllm's input: those of its README, of its sampling parameters and of its batching of chunks.
WORKER_VLLM_FIELDS = (
    *("prompt", "messages", "stream", "sampling_params", "max_batch_size", "min_batch_size"),
    *("batch_size_growth_factor", "apply_chat_template", "use_openai_format", "best_of", "n", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "use_beam_search"),
    *("length_penalty", "early_stopping", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens"),
    *("logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "seed"),
    *("include_stop_str_in_output", "echo", "add_generation_prompt", "logit_bias", "user"),
)
_TABLE = re.compile(r"(?<=<!-- fields -->\n).*?(?=<!-- /fields -->)", re.DOTALL)
_ROUTES = {"native": "native", "chat/completions": "chat", "completions": "completions"}
_TEXT = {"served": "served", "harmless": "no effect", "refused": "refused"}


def in_vllm(field: Field) -> str:
    """What becomes of a field in the vLLM engine."""
    if field.by_worker:
        return "served"
    if field.text == "harmless":
        return "passed on, or no effect"
    if any(field is FIELDS[name] for name in NOT_STREAMED):
        return "passed on by OpenAI's routes, without stream"
    return "refused" if field.replaced else "passed on"


def table() -> str:
    """The fields as a Markdown table."""
    rows = []
    for name, field in FIELDS.items():
        routes = "all" if len(field.routes) == len(_ROUTES) else ", ".join(_ROUTES[route] for route in field.routes)
        neutral = f"; only `{'`, `'.join(map(json.dumps, field.neutral))}` is taken" if field.neutral else ""
        meaning = "; ".join(filter(None, (field.note, field.instead)))
        rows.append(f"| `{name}` | {routes} | {_TEXT[field.text]}{neutral} | {in_vllm(field)} | {meaning} |")
    return "\n".join(["| field | routes | `text` | `vllm` | meaning |", "|---|---|---|---|---|", *rows, ""])


def worker_vllm_table() -> str:
    """The fields of worker-vllm's input as a Markdown table."""
    rows = []
    for name in WORKER_VLLM_FIELDS:
        field = FIELDS[name]
        neutral = f"; only `{'`, `'.join(map(json.dumps, field.neutral))}` is taken" if field.neutral else ""
        rows.append(f"| `{name}` | {_TEXT[field.text]}{neutral} | {in_vllm(field)} |")
    return "\n".join(["| field | `text` | `vllm` |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _match: table(), PAGE.read_text(), count=1))
    MIGRATION_PAGE.write_text(
        _OF_WORKER_VLLM.sub(lambda _match: worker_vllm_table(), MIGRATION_PAGE.read_text(), count=1)
    )
