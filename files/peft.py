"""
LoRA in the files of PEFT (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors.
"""
import pathlib

import torch

from files.checked_json import read_fields
from files.text import naming, one_line, write_json
from files.weights import fill, open_tensors, write_tensors
from lora import apply_lora, lora_layers


def peft_parameters(model):
    """{name in PEFT's files: parameter}; "layers.0.attn.q" is "model.layers.0.self_attn.q_proj" there."""
    named = {}
    for name, m in lora_layers(model):
        theirs = f"base_model.model.model.{name.replace('attn', 'self_attn')}_proj"
        named[f"{theirs}.lora_A.weight"] = m.lora_a
        named[f"{theirs}.lora_B.weight"] = m.lora_b
    return named


def save_lora(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does."""
    layers, folder = lora_layers(model), pathlib.Path(folder)
    if not layers:
        raise ValueError("this model has no LoRA to save; apply_lora first")
    m, targets = layers[0][1], sorted({name.split(".")[-1] + "_proj" for name, _ in layers})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=m.rank, lora_alpha=m.alpha, lora_dropout=m.dropout,
                  bias="none", fan_in_fan_out=False, inference_mode=True, target_modules=targets,
                  base_model_name_or_path=None)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", peft_parameters(model))
    write_json(folder / "adapter_config.json", config)


# What adapter_config.json may say without changing the mathematics of LoRALinear; all else that is set is refused.
PEFT_PLAIN = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "auto_mapping", "peft_version",
              "revision", "base_model_name_or_path", "inference_mode", "megatron_core", "qalora_group_size"}
PEFT_VALUES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def load_lora(model, folder):
    """Apply and fill the LoRA that PEFT (or save_lora) wrote to folder."""
    folder = pathlib.Path(folder)
    config = read_fields(folder / "adapter_config.json")
    refused = [one_line(f"{key} {value}")[:80] for key, value in config.values.items()
               if value and key not in PEFT_PLAIN and value not in PEFT_VALUES.get(key, ())]
    if refused:
        raise ValueError(f"{config.where}: {', '.join(refused)}: not plain LoRA; merge the adapter with PEFT and load "
                         "the merged model")
    targets = config.take("target_modules", list[str])                       # names such as q_proj
    lora = (config.take("r", int, 1), config.take("lora_alpha", float), config.take("lora_dropout", float, 0, 1, 0.0),
            [name.removesuffix("_proj") for name in targets])
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        file = folder / "adapter_model.bin"                                        # PEFT before 0.8
    stored = open_tensors(file).items()
    with naming(config.where), torch.device("meta"):           # a rank is compared before memory is taken for it
        claimed = apply_lora(type(model)(model.config), *lora)
    fill(peft_parameters(claimed), stored, file)
    fill(peft_parameters(apply_lora(model, *lora)), stored, file)
    return model
