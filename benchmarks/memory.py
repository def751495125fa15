"""How do memory and time grow with a text? Ours up to ten million tokens, full attention as far as it fits."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from modeling_armt import ARMTCache

from .measuring import GIB, free, measure
from .models import build_armt, stock_backbone
from .prefill import backend, read_all
from .results import DEVICE, DTYPE, Results, make_parser, on_gpu


ALTERNATIVES = ("ours", "full-attention")
LENGTHS = [16_384, 65_536, 262_144, 1_048_576, 10_485_760]


def kept_gib(cache: Cache) -> float:
    """GiB that stay when a text has been read: the associative state, and keys and values."""
    tensors = []
    keys = cache
    if isinstance(cache, ARMTCache):
        keys = cache.keys
        tensors += [tensor for state in cache.states.values() if state is not None for tensor in state]
    for layer in [] if keys is None else keys.layers:
        tensors += [layer.keys, layer.values]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) / GIB


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("memory", __doc__, ALTERNATIVES)
    parser.add_argument("--lengths", type=int, nargs="+", default=on_gpu(LENGTHS, [256, 1024, 4096]))
    parser.add_argument("--block-segments", type=int, default=512, help="segments that `read` takes at once")
    parser.add_argument("--max-full-attention", type=int, default=524_288, help="longest text for full attention")
    parser.add_argument("--backend", choices=["flash", "cudnn"], default="flash", help="kernel of full attention")
    args = parser.parse_args(argv)

    model = build_armt(args.shape, DEVICE, DTYPE, args.segment_size, args.num_mem_tokens, args.d_mem, args.seed)
    vocabulary = model.config.text_config.vocab_size
    results = Results("memory", args, weights_gib=sum(p.nbytes for p in model.parameters()) / GIB)

    def run(name: str, length: int, read: Any) -> None:
        ids = torch.randint(vocabulary, (length,), dtype=torch.int32)
        kept: dict[str, Any] = {}

        def once() -> None:
            kept.clear()
            kept["kept_gib"] = kept_gib(read(ids))

        results.add(name, tokens=length, **measure(once, repeats=1, warmup=0), **kept)

    if "ours" not in args.skip:
        model.compile_armt()
        options = {"schedule": "diagonal", "block_segments": args.block_segments}
        few = torch.zeros(32 * args.segment_size, dtype=torch.int32)
        measure(lambda: model.read(few, **options), repeats=1)  # compiles
        for length in sorted(args.lengths):
            run("ours", length, lambda ids: model.read(ids, **options).cache)
        model.compile_armt(False)
        free()
    if "full-attention" not in args.skip:
        stock = stock_backbone(model)
        with backend(args.backend), torch.no_grad():
            measure(lambda: read_all(stock, torch.zeros(1024, dtype=torch.int32)), repeats=1)
            for length in sorted(args.lengths):
                if length <= args.max_full_attention:
                    run("full-attention", length, lambda ids: read_all(stock, ids))

    results.print_table("tokens", "median_s", "peak_gib", "kept_gib")
    return results


if __name__ == "__main__":
    main()
