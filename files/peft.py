"""
LoRA in the files of PEFT (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors.
"""
import pathlib

from files.text import read_json, write_json
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
    config = read_json(folder / "adapter_config.json")
    refused = [f"{key} {value!r}" for key, value in config.items()
               if value and key not in PEFT_PLAIN and value not in PEFT_VALUES.get(key, ())]
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        refused.append(f"target_modules {targets!r}, not a list of names such as q_proj")
    if refused:
        raise ValueError(f"{folder / 'adapter_config.json'}: {', '.join(refused)}: not plain LoRA; merge the adapter "
                         "with PEFT and load the merged model")
    apply_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
               [name.removesuffix("_proj") for name in targets])
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        file = folder / "adapter_model.bin"                                        # PEFT before 0.8
    fill(peft_parameters(model), open_tensors(file).items(), file)
    return model
