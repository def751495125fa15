"""
An adapter of the package from what search.py kept, and a score of it on the validation stories.

    python to_package.py FOLDER/FILE.gguf RUN.lora.pt RUN.memory.pt OUT/whole.pt WHERE

WHERE/backbone is the dequantised backbone, WHERE/armt its conversion, WHERE/adapter the adapter.
"""

import random
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from search import Data
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.convert import convert


TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
TARGETS |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}


def backbone_of(file: Path, out: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


@torch.no_grad()
def fill(model, recipe: dict, state: dict) -> None:
    parameters = dict(model.named_parameters())

    def put(name: str, value: torch.Tensor):
        parameters.pop(f"base_model.model.{name}").copy_(value)

    for layer in range(len(state["lora.Aq"])):
        for key, target in TARGETS.items():
            part = "self_attn" if key in "qkvo" else "mlp"
            for side in "AB":
                put(f"model.model.layers.{layer}.{part}.{target}.lora_{side}.default.weight",
                    state[f"lora.{side}{key}"][layer])  # fmt: skip
    for place, layer in enumerate(recipe["layers"]):
        names = {"query": "q", "key": "k", "value": "v", "beta": "b"}
        for name, key in names.items():
            put(f"memory.{layer}.memory_{name}.modules_to_save.default.weight", state[f"mem.{key}"][place])
        put(f"memory.{layer}.memory_beta.modules_to_save.default.bias", state["mem.bias"][place])
        for side in ("read", "write"):
            weight = torch.rsqrt(state[f"of_{side}s.var"][place] + 1e-4)
            norm = f"memory.{layer}.memory_{side}_norm.modules_to_save.default"
            put(f"{norm}.weight", weight)
            put(f"{norm}.bias", -state[f"of_{side}s.mean"][place] * weight)
    put("memory_tokens.modules_to_save.default.weight", state["tokens"])
    left = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert not left, left


@torch.no_grad()
def score(model, data: Data, level: tuple[int, int], count: int) -> float:
    rows, _, _, _ = data.batch("test", count, level, False, random.Random(5), True)
    rows = torch.tensor(rows)
    hits = []
    for part in rows.split(16):
        logits = model(part[:, :-1], use_cache=False, logits_to_keep=1, schedule="sequential").logits[:, -1]
        hits.append(logits.argmax(-1) == part[:, -1])
    return torch.cat(hits).float().mean().item()


def main():
    gguf, lora, memory, stories, out = (Path(x) for x in sys.argv[1:6])
    lora, memory = torch.load(lora), torch.load(memory)
    recipe, state = lora["config"], lora["state"] | memory["state"]
    if not (out / "armt").exists():
        backbone_of(gguf, out / "backbone")
        convert(out / "backbone", out / "armt", segment_size=recipe["seg"], num_mem_tokens=recipe["m"],
                d_mem=recipe["d"], memory_layers=recipe["layers"], memory_norm=True,
                spread_memory_tokens=bool(recipe["spread"]))  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(out / "armt")
    model = get_peft_model(base, lora_config(base, r=recipe["r"], lora_alpha=2 * recipe["r"])).eval()
    fill(model, recipe, state)
    model.save_pretrained(out / "adapter")
    file = out / "adapter" / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, {"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(out / "armt", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().eval()
    data = Data(torch.load(stories), recipe["seg"])
    print(file.stat().st_size, recipe["name"], flush=True)
    for level, count in (((1, 0), 256), ((3, 8), 64)):
        print(level, count, round(score(model, data, level, count), 3), flush=True)


if __name__ == "__main__":
    main()
