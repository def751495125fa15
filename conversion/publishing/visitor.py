"""
A stranger: loads a checkpoint where this package does not exist, and writes down the logits that it finds.

Run as a script of its own, never imported: `python -P visitor.py '{"source": ..., ...}'`.
"""

import json
import sys


class Absent:
    """Keeps this package from being imported, wherever it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "modeling_armt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def visit(source: str, revision: str | None, adapter: bool, ids: str, out: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if adapter:
        from peft import AutoPeftModelForCausalLM as AutoModel
    else:
        from transformers import AutoModelForCausalLM as AutoModel
    options = {} if revision is None else {"revision": revision}
    model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype="auto", **options).eval()
    kind = (model.get_base_model() if adapter else model).config.model_type
    if kind != "armt":
        sys.exit(f"loaded as a plain {kind} model, without memory")
    with torch.no_grad():
        logits = model(load_file(ids)["ids"], use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent)
    visit(**json.loads(sys.argv[1]))
