"""LoRA adapters of random weights, as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def write_adapter(
    folder: Path, model: Path, *, seed: int, base: str | None = "org/name", std: float = 0.5, **options: Any
) -> None:
    """An adapter of the model in `model`, whose effect shows in each token; `base`: the model that it names; `std`: of
    its weights."""
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "up_proj"]} | options
    adapted = get_peft_model(plain, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    change_config(folder, base_model_name_or_path=base)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
