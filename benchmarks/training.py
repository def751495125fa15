"""How long does a training step take? LoRA and memory, ours by schedule, the backbone with full attention and LoRA."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import modeling_armt

from .measuring import ceilings, free, measure
from .models import build_armt, linear_flops, stock_backbone
from .results import DEVICE, DTYPE, Results, make_parser, on_gpu


if importlib.util.find_spec("modeling_armt.conversion") is None:  # not installed: it stands beside the package
    modeling_armt.__path__.append(str(Path(modeling_armt.__file__).parents[1]))

from modeling_armt.conversion.adapters import lora_config, parameter_groups  # noqa: E402


ALTERNATIVES = ("ours", "ours-sequential", "full-attention")
# Passes through the frozen linear layers: forward and the gradient of their input (LoRA needs none of their weights),
# and forward again under checkpointing. The head's logits are always computed twice.
PASSES = {False: 2, True: 3}
HEAD_PASSES = 3
FLOPS_COUNT = (
    "2 FLOPs a weight and position: the linear layers of the frozen backbone 2 times (forward, gradient of the "
    "input), 3 times with checkpointing; the head 3 times; attention, LoRA and memory not counted"
)


def full_attention_loss(model: PreTrainedModel, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """The loss of next tokens, its logits by chunks of columns and never kept, as ours are by segments."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = ids[:, 1:]

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")

    pieces = zip(hidden.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True)
    return sum(checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces) / targets.numel()


def set_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Gradient checkpointing on or off; transformers renamed it on the way."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{word}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{word}_checkpointing_disable")()


def training_step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, autocast: bool) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main(argv: list[str] | None = None) -> Results:
    parser = make_parser("training", __doc__, ALTERNATIVES)
    parser.add_argument("--segments", type=int, default=on_gpu(8, 3), help="segments of a text")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=on_gpu([8], [2]))
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"], help="of gradients"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="ours without compiled code too")
    parser.add_argument(
        "--adapters",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of LoRA: float32 under autocast, as Trainer does, or bfloat16 without",
    )
    args = parser.parse_args(argv)

    autocast = args.adapters == "float32" and DEVICE.type == "cuda"
    model = build_armt(args.shape, DEVICE, DTYPE, args.segment_size, args.num_mem_tokens, args.d_mem, args.seed)
    stock, limits = stock_backbone(model), ceilings(DEVICE)
    layers, head = linear_flops(model.decoder), 2 * model.get_output_embeddings().weight.numel()
    results = Results("training", args, ceilings=limits, flops_count=FLOPS_COUNT)
    batches = [
        torch.randint(model.config.text_config.vocab_size, (batch, args.segments * args.segment_size), device=DEVICE)
        for batch in args.batch_sizes
    ]

    def run(
        name: str,
        base: PreTrainedModel,
        adapted: torch.nn.Module,
        loss: Callable[[torch.Tensor], torch.Tensor],
        positions_per_token: float,
        **more,
    ) -> None:
        groups = parameter_groups(adapted, lr=3e-4, memory_lr=1e-3)
        optimizer = torch.optim.AdamW(groups, fused=DEVICE.type == "cuda")
        for setting in args.checkpointing:
            checkpointing = setting == "on"
            set_checkpointing(base, checkpointing)
            for ids in batches:
                step = lambda ids=ids: training_step(lambda: loss(ids), optimizer, autocast)  # noqa: E731
                measured: dict[str, Any] = measure(step, args.repeats, warmup=2)
                flops = ids.numel() * (positions_per_token * layers * PASSES[checkpointing] + head * HEAD_PASSES)
                if "median_s" in measured:
                    measured["tokens_per_s"] = ids.numel() / measured["median_s"]
                    measured["matmul_share"] = flops / measured["median_s"] / 1e12 / limits["matmul_tflops"]
                optimizer.zero_grad(set_to_none=True)
                shape = {"batch": len(ids), "tokens": ids.numel(), "checkpointing": checkpointing}
                results.add(name, **shape, **measured, **more)

    options = {"autocast_adapter_dtype": args.adapters == "float32"}
    config = lora_config(model, r=args.rank)
    adapted = get_peft_model(model, config, **options).train()
    overhead = 1 + args.num_mem_tokens / args.segment_size
    variants = [("ours", True, "diagonal"), ("ours-sequential", True, "sequential")]
    variants += [(f"{name}-eager", False, schedule) for name, _, schedule in variants if args.eager]
    for name, compiled, schedule in variants:
        if name.removesuffix("-eager") in args.skip:
            continue
        model.compile_armt(compiled)

        def loss(ids: torch.Tensor, schedule: str = schedule) -> torch.Tensor:
            return adapted(input_ids=ids, labels=ids, return_logits=False, schedule=schedule).loss

        run(name, model, adapted, loss, overhead, compiled=compiled)
        model.compile_armt(False)
        free()

    if "full-attention" not in args.skip:
        config = LoraConfig(r=args.rank, lora_alpha=32, target_modules=config.target_modules)
        lora = get_peft_model(stock, config, **options).train()
        run("full-attention", stock, lora, lambda ids: full_attention_loss(stock, ids, args.segment_size), 1.0)

    results.print_table(
        "batch", "checkpointing", "median_s", "tokens_per_s", "matmul_share", "peak_gib", "first_call_s"
    )
    return results


if __name__ == "__main__":
    main()
