"""How fast are many texts read at once? Ours in one call, full attention batched the same way as far as it fits."""

from collections.abc import Callable
from typing import Any

import torch

from .measuring import measure
from .models import build_armt, stock_backbone
from .prefill import BACKENDS, backend
from .results import DEVICE, DTYPE, Results, make_parser, on_gpu


ALTERNATIVES = ("ours", "ours-sequential", "full-attention")


def largest_that_fits(rows: int, run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Runs with as many rows a call as fit, halved from all of them; returns that measurement with `rows_per_call`."""
    while True:
        measured = run(rows)
        if measured.get("error") != "out of memory" or rows == 1:
            return {"rows_per_call": rows, **measured}
        rows = (rows + 1) // 2


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("requests", __doc__, ALTERNATIVES)
    parser.add_argument("--rows", type=int, default=on_gpu(64, 4), help="texts")
    parser.add_argument("--length", type=int, default=on_gpu(8192, 256), help="tokens of each")
    parser.add_argument("--rows-per-call", type=int, help="texts a call at most; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    model = build_armt(args.shape, DEVICE, DTYPE, args.segment_size, args.num_mem_tokens, args.d_mem, args.seed)
    ids = torch.randint(model.config.text_config.vocab_size, (args.rows, args.length), device=DEVICE)
    results = Results("requests", args)

    def run(name: str, call: Callable[[torch.Tensor], Any], **more) -> None:
        """`call` reads a batch and returns what has to be kept of it, as a server would keep it."""

        def measure_rows(rows: int) -> dict[str, Any]:
            def all_rows() -> None:
                for piece in ids.split(rows):
                    call(piece)

            return measure(all_rows, args.repeats)

        measured = largest_that_fits(min(args.rows, args.rows_per_call or args.rows), measure_rows)
        if "median_s" in measured:
            measured["tokens_per_s"] = ids.numel() / measured["median_s"]
        results.add(name, rows=args.rows, tokens=ids.numel(), **measured, **more)

    with torch.no_grad():
        for name, compiled, schedule in (("ours", True, "diagonal"), ("ours-sequential", False, "sequential")):
            if name not in args.skip:
                model.compile_armt(compiled)
                run(name, lambda piece, schedule=schedule: model.read(piece, schedule=schedule))
        model.compile_armt(False)
        if "full-attention" not in args.skip:
            stock = stock_backbone(model)
            for kernel in BACKENDS if DEVICE.type == "cuda" else ["flash"]:
                with backend(kernel):
                    run("full-attention", lambda piece: stock(piece, logits_to_keep=1), backend=kernel)

    results.print_table("backend", "rows_per_call", "median_s", "tokens_per_s", "peak_gib", "first_call_s")
    return results


if __name__ == "__main__":
    main()
