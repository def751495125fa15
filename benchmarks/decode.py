"""How fast are tokens generated? Ours, by itself and under stock `generate`, and the backbone under `generate`."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from modeling_armt.compatibility_armt import CACHE

from .measuring import ceilings, free, measure, seconds
from .models import build_armt, bytes_per_step, stock_backbone
from .prefill import top_kernels
from .results import DEVICE, DTYPE, Results, make_parser, on_gpu


ALTERNATIVES = ("ours", "ours-generate", "ours-eager", "full-attention", "full-attention-static")


@torch.no_grad()
def step_loop(model: PreTrainedModel, ids: torch.Tensor, cache: Any, new_tokens: int) -> None:
    """Greedy generation without anything around it: one call of the model a token."""
    for _ in range(new_tokens):
        ids = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


def generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options) -> None:
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("decode", __doc__, ALTERNATIVES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=on_gpu([1, 32], [1, 2]))
    parser.add_argument("--context", type=int, default=on_gpu(512, 16), help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=on_gpu(3200, 200), help="for ours, across segment borders")
    parser.add_argument("--short", type=int, default=on_gpu(256, 16), help="tokens for eager code and full attention")
    parser.add_argument("--profile", action="store_true", help="record the kernels of 32 steps of ours")
    args = parser.parse_args(argv)

    model = build_armt(args.shape, DEVICE, DTYPE, args.segment_size, args.num_mem_tokens, args.d_mem, args.seed)
    vocabulary, limits = model.config.text_config.vocab_size, ceilings(DEVICE)
    weights, state = bytes_per_step(model)
    results = Results("decode", args, ceilings=limits, weight_bytes=weights, state_bytes_per_row=state)
    prompts = [torch.randint(vocabulary, (batch, args.context), device=DEVICE) for batch in args.batch_sizes]

    def add(name: str, prompt: torch.Tensor, tokens: int, measured: dict[str, Any], **more) -> None:
        batch = len(prompt)
        if "median_s" in measured:
            step = measured["median_s"] / tokens
            measured["ms_per_step"] = step * 1000
            measured["tokens_per_s"] = batch / step
            # Of reading the weights once a step, and of reading every row's associative state too.
            measured["bandwidth_share"] = weights / limits["copy_tb_s"] / 1e12 / step
            if name.startswith("ours"):
                total = weights + batch * state
                measured["bandwidth_share_with_state"] = total / limits["copy_tb_s"] / 1e12 / step
        results.add(name, batch=batch, context=prompt.shape[1], new_tokens=tokens, **measured, **more)

    def loop(prompt: torch.Tensor, cache: Any, tokens: int) -> Callable[[], None]:
        """Generation on a copy of what a prompt left behind."""
        return lambda: step_loop(model, prompt[:, -1:], cache.fork(), tokens)

    def read(prompt: torch.Tensor) -> Any:
        """The memory of a prompt, cut so that its last segment is open with room for a short run."""
        return model.read(prompt[:, :-1]).cache

    for name, compiled in (("ours", True), ("ours-eager", False)):
        model.compile_armt(compiled)
        for prompt in prompts:
            if name in args.skip:
                continue
            cache = read(prompt)
            room = args.segment_size - cache.opened[0] - 1
            steady = min(args.short, room)
            if compiled:
                # The warm-up crosses a border too: whatever has to be prepared is.
                before = model.fast.cold_start_s
                measure(loop(prompt, cache, room + 8), repeats=1, warmup=0)
                cold = {"cold_start_s": model.fast.cold_start_s - before}
                add(name, prompt, args.new_tokens, measure(loop(prompt, cache, args.new_tokens), 1, 0), **cold)
                add(f"{name}-steady", prompt, steady, measure(loop(prompt, cache, steady), 3, 0))
                if args.profile:
                    profiles = results.content.setdefault("profile", {})
                    profiles[f"batch {len(prompt)}"] = top_kernels(loop(prompt, cache, 32))
                    results.write()
            else:
                add(name, prompt, steady, measure(loop(prompt, cache, steady), 1, 1))
        if compiled and "ours-generate" not in args.skip:
            for prompt in prompts:
                # Its cost beside the new tokens: the prompt.
                generate(model, prompt, 8)
                reading = seconds(lambda prompt=prompt: read(prompt))
                measured = measure(lambda prompt=prompt: generate(model, prompt, args.new_tokens), 1, 0)
                add("ours-generate", prompt, args.new_tokens, measured, prompt_s=reading)
        model.compile_armt(False)
        free()

    for name, options in (("full-attention", {}), ("full-attention-static", {"cache_implementation": "static"})):
        if name in args.skip:
            continue
        stock = stock_backbone(model)
        for prompt in prompts:
            function = lambda prompt=prompt, stock=stock, options=options: generate(  # noqa: E731
                stock, prompt, args.short, **options
            )
            add(name, prompt, args.short, measure(function, repeats=2, warmup=1))
        del stock
        torch.compiler.reset()
        free()

    results.print_table(
        "batch", "new_tokens", "ms_per_step", "tokens_per_s", "bandwidth_share", "peak_gib", "first_call_s"
    )
    return results


if __name__ == "__main__":
    main()
