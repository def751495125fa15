"""
The paper's tiny model for associative retrieval: a GPT-NeoX of 4 layers and width 128 with random weights, and
memories on it, as an ARMT checkpoint to train in full.

    python model_cards/associative_retrieval/make_backbone.py --out tiny-armt --seed 0
"""

import argparse
import warnings
from pathlib import Path

from transformers import AutoModelForCausalLM, GPTNeoXConfig, set_seed

from modeling_armt import ARMTForCausalLM
from modeling_armt.configuration_armt import VARIANTS
from modeling_armt.conversion.convert import attach_checked
from modeling_armt.conversion.files import staged_folder
from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval


def make_backbone(
    out: str | Path,
    seed: int = 0,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    num_mem_tokens: int = 4,
    d_mem: int = 64,
    key_size: int = 1,
    value_size: int = 1,
    variant: str = "v2",
    correction: bool = True,
) -> ARMTForCausalLM:
    """
    Writes the checkpoint; it has no tokenizer, since the task's symbols are token ids.

    Args:
        out: folder to write; must not exist, or be empty.
        seed: of the weights.
        width, layers, heads: of the backbone.
        num_mem_tokens, d_mem, variant, correction: of the memory, see [`ARMTConfig`].
        key_size, value_size: symbols; a segment has one pair.
    """
    task = AssociativeRetrieval(key_size, value_size)
    set_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=task.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=task.eos_token_id,
        pad_token_id=task.pad_token_id,
    )
    options = {"segment_size": task.pair_size, "num_mem_tokens": num_mem_tokens, "d_mem": d_mem}
    with staged_folder(out) as folder:
        backbone = AutoModelForCausalLM.from_config(config).eval()
        model = attach_checked(backbone, **options, correction=correction, **VARIANTS[variant])
        model.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--num-mem-tokens", type=int, default=4)
    parser.add_argument("--d-mem", type=int, default=64)
    parser.add_argument("--key-size", type=int, default=1, help="symbols of a key in the first stage (default 1)")
    parser.add_argument("--value-size", type=int, default=1)
    parser.add_argument("--variant", choices=list(VARIANTS), default="v2", help="of the memory (default v2)")
    parser.add_argument("--no-correction", action="store_true", help="without the correction gamma, for comparison")
    args = vars(parser.parse_args())
    correction = not args.pop("no_correction")
    warnings.filterwarnings("ignore", category=FutureWarning)
    model = make_backbone(**args, correction=correction)
    print(f"{args['out']}: {model.num_parameters():,} parameters, segments of {model.config.segment_size} tokens")


if __name__ == "__main__":
    main()
