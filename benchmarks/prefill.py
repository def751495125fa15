"""How long does it take to read a text? Ours by schedule, the same backbone with full attention, Gated DeltaNet."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from modeling_armt.compatibility_armt import CACHE

from .measuring import ceilings, free, measure, repeats_for
from .models import build_armt, build_gated_deltanet, count_parameters, has_fla, linear_flops, stock_backbone
from .results import DEVICE, DTYPE, Results, make_parser, on_gpu


ALTERNATIVES = ("ours", "ours-eager", "ours-sequential", "full-attention", "full-attention-compiled", "gated-deltanet")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# From here on a run is not worth a warm-up of its own.
LONG = 200_000
# Beyond this only the faster of the attention backends runs.
BOTH_BACKENDS = 262_144
# What a call of Gated DeltaNet is given at once: its activations grow with it.
DELTANET_CHUNK = 131_072


def read_all(model: torch.nn.Module, ids: torch.Tensor, chunk: int | None = None) -> Any:
    """Prefill as `generate` does it, with a cache and the logits of the last token; returns the cache."""
    cache = None
    for piece in ids.split(chunk or len(ids)):
        piece = piece.to(DEVICE, torch.long)[None]
        cache = model(piece, **{CACHE: cache}, use_cache=True, logits_to_keep=1)[CACHE]
    return cache


def backend(name: str) -> Any:
    """Pins the attention kernel; a CPU has only one."""
    return sdpa_kernel(BACKENDS[name]) if DEVICE.type == "cuda" else nullcontext()


def top_kernels(function: Callable[[], Any], count: int = 25) -> list[dict[str, Any]]:
    """The operations that take most of one call: on a GPU its kernels."""
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        function()
    kernels = [
        (event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    total = sum(time for _, _, time in kernels)
    kernels.sort(key=lambda kernel: -kernel[2])
    return [
        {"name": name[:200], "count": times, "total_ms": time / 1000, "share": time / max(total, 1e-9)}
        for name, times, time in kernels[:count]
    ]


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("prefill", __doc__, ALTERNATIVES)
    parser.add_argument("--lengths", type=int, nargs="+", default=on_gpu([131_072, 1_048_576], [512, 2048]))
    parser.add_argument("--block-segments", type=int, default=512, help="segments that `read` takes at once")
    parser.add_argument(
        "--max-slow", type=int, default=131_072, help="longest text for ours-eager and ours-sequential"
    )
    parser.add_argument("--max-full-attention", type=int, default=524_288, help="longest text for full attention")
    parser.add_argument(
        "--compile-backbone", action="store_true", help="full attention with compiled layers too (one minute)"
    )
    parser.add_argument("--max-deltanet", type=int, default=1_048_576, help="longest text for Gated DeltaNet")
    parser.add_argument("--fla-layers", type=int, help="layers of Gated DeltaNet; default: the size of the backbone")
    parser.add_argument("--profile", action="store_true", help="record the kernels of one prefill of the first length")
    args = parser.parse_args(argv)

    model = build_armt(
        args.shape, DEVICE, DTYPE, args.segment_size, args.num_mem_tokens, args.d_mem, args.seed
    ).compile_armt()
    texts = [torch.randint(model.config.text_config.vocab_size, (n,), dtype=torch.int32) for n in sorted(args.lengths)]
    limits = ceilings(DEVICE)
    positions_per_token = 1 + args.num_mem_tokens / args.segment_size
    floor_per_token = positions_per_token * linear_flops(model.decoder) / limits["matmul_tflops"] / 1e12
    results = Results("prefill", args, ceilings=limits, parameters=count_parameters(model))

    def run(name: str, ids: torch.Tensor, function: Callable[[], Any], repeats: int, **more) -> dict[str, Any]:
        # Once warm, a long text is nothing new.
        measured = measure(function, repeats, warmup=int(len(ids) < LONG or ids is texts[0]))
        if "median_s" in measured:
            measured["tokens_per_s"] = len(ids) / measured["median_s"]
        if name.startswith("ours"):
            measured["floor_s"] = floor_per_token * len(ids)
        return results.add(name, tokens=len(ids), **measured, **more)

    def read(ids: torch.Tensor, schedule: str) -> Callable[[], Any]:
        return lambda: model.read(ids, schedule=schedule, block_segments=args.block_segments)

    ours = [("ours", True, "diagonal"), ("ours-eager", False, "diagonal"), ("ours-sequential", False, "sequential")]
    for name, compiled, schedule in ours:
        if name in args.skip:
            continue
        model.compile_armt(compiled)
        for number, ids in enumerate(texts):
            if name != "ours" and len(ids) > args.max_slow:
                continue
            row = run(name, ids, read(ids, schedule), repeats_for(len(ids)) if compiled else 3)
            if number == 0 and compiled:
                row["cold_start_s"] = model.fast.cold_start_s
                results.write()
        if args.profile and name == "ours":
            results.content["profile"] = top_kernels(read(texts[0], schedule))
            results.write()
        model.compile_armt(False)
        free()

    stock = stock_backbone(model)
    short = [ids for ids in texts if len(ids) <= args.max_full_attention]
    names = list(BACKENDS if DEVICE.type == "cuda" else ["flash"])
    if "full-attention" not in args.skip:
        fastest = {}
        for ids in short:
            for name in names if len(ids) <= BOTH_BACKENDS or not fastest else [min(fastest, key=fastest.get)]:
                with backend(name), torch.no_grad():
                    repeats = 3 if len(ids) <= BOTH_BACKENDS else 1
                    row = run("full-attention", ids, lambda ids=ids: read_all(stock, ids), repeats, backend=name)
                if "median_s" in row:
                    fastest[name] = row["median_s"] / len(ids)
        names = sorted(fastest, key=fastest.get) or names
    if args.compile_backbone and "full-attention-compiled" not in args.skip:
        for layer in stock.model.layers:
            layer.compile()
        with backend(names[0]), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            for ids in short:
                repeats = 3 if len(ids) <= BOTH_BACKENDS else 1
                function = lambda ids=ids: read_all(stock, ids)  # noqa: E731
                run("full-attention-compiled", ids, function, repeats, backend=names[0])

    if has_fla() and "gated-deltanet" not in args.skip and DEVICE.type == "cuda":
        deltanet = build_gated_deltanet(stock, args.fla_layers)
        more = {"parameters": count_parameters(deltanet), "layers": deltanet.config.num_hidden_layers}
        with torch.no_grad():
            for ids in (ids for ids in texts if len(ids) <= args.max_deltanet):
                function = lambda ids=ids: read_all(deltanet, ids, DELTANET_CHUNK)  # noqa: E731
                run("gated-deltanet", ids, function, repeats_for(len(ids)), **more)

    add_speed_ups(results)
    results.print_table("tokens", "backend", "median_s", "tokens_per_s", "peak_gib", "floor_s", "speed_up")
    return results


def add_speed_ups(results: Results) -> None:
    """How many times faster each row is than the fastest full attention on as many tokens."""
    best: dict[int, float] = {}
    for row in results.rows:
        if row["name"].startswith("full-attention") and "median_s" in row:
            best[row["tokens"]] = min(row["median_s"], best.get(row["tokens"], float("inf")))
    for row in results.rows:
        if "median_s" in row and row["tokens"] in best:
            row["speed_up"] = best[row["tokens"]] / row["median_s"]
    results.write()


if __name__ == "__main__":
    main()
