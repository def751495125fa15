"""How far does bfloat16 drift over a long text? The diagonal and the sequential schedule against a float32 run."""

from typing import Any

import torch

from modeling_armt import ARMTForCausalLM

from .measuring import free, measure
from .models import build_armt
from .results import DEVICE, Results, make_parser, on_gpu


ALTERNATIVES = ("diagonal", "diagonal-eager", "sequential")


@torch.no_grad()
def read(model: ARMTForCausalLM, ids: torch.Tensor, columns: torch.Tensor, schedule: str) -> dict[str, Any]:
    """The state of every layer and the logits of some columns, in float32 on the host; or `error`."""
    output: dict[str, Any] = {}

    def run() -> None:
        result = model(ids, use_cache=True, logits_to_keep=columns, schedule=schedule)
        states = result.cache.states.items()
        output["logits"] = result.logits[0].float().cpu()
        output["states"] = {layer: state.map(torch.Tensor.cpu) for layer, state in states}

    return measure(run, repeats=1, warmup=0) | output


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


def compare(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """
    Relative errors of A and z by layer and of the logits, the mean probability mass that moved (half the sum of
    absolute differences), and how often the most likely token is the same.
    """
    logits, expected = run["logits"], reference["logits"]
    moved = (logits.softmax(-1) - expected.softmax(-1)).abs().sum(-1).mean() / 2
    pairs = {layer: (run["states"][layer], state) for layer, state in reference["states"].items()}
    return {
        "A_error": {layer: relative(state.A, expected.A) for layer, (state, expected) in pairs.items()},
        "z_error": {layer: relative(state.z, expected.z) for layer, (state, expected) in pairs.items()},
        "logits_error": relative(logits, expected),
        "mass_moved": moved.item(),
        "argmax_agreement": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("drift", __doc__, ALTERNATIVES)
    parser.add_argument("--length", type=int, default=on_gpu(131_072, 1024))
    parser.add_argument("--columns", type=int, default=1024, help="columns whose logits are compared, spread evenly")
    args = parser.parse_args(argv)

    sizes = (args.segment_size, args.num_mem_tokens, args.d_mem, args.seed)
    model = build_armt(args.shape, DEVICE, torch.bfloat16, *sizes)
    ids = torch.randint(model.config.text_config.vocab_size, (1, args.length), device=DEVICE)
    count = min(args.columns, args.length)
    columns = (torch.arange(1, count + 1) * args.length // count - 1).to(DEVICE)  # the last one among them
    results = Results("drift", args, reference="sequential, float32, the same weights")

    runs = {}
    for name, compiled, schedule in (
        ("diagonal", True, "diagonal"),
        ("diagonal-eager", False, "diagonal"),
        ("sequential", False, "sequential"),
    ):
        if name not in args.skip:
            model.compile_armt(compiled)
            runs[name] = read(model, ids, columns, schedule)
            model.compile_armt(False)
            free()
    model.float()
    free()
    reference = read(model, ids, columns, "sequential")
    for name, run in runs.items():
        if "error" in run:
            results.add(name, tokens=args.length, error=run["error"])
            continue
        errors = compare(run, reference)
        worst = {f"worst_{kind}": max(errors[kind].values()) for kind in ("A_error", "z_error")}
        results.add(name, tokens=args.length, **worst, **errors)

    results.print_table("worst_A_error", "worst_z_error", "logits_error", "mass_moved", "argmax_agreement")
    return results


if __name__ == "__main__":
    main()
