"""Train the small Llama that ships inside the package for `armt demo`, from plain-text English novels.

One command, on one GPU (a CPU does for tiny sizes), tokenizer included:

    python conversion/demo/train_backbone.py --novels novels.tar.xz --out backbone --minutes 5

`--novels` is a folder or a tar archive of UTF-8 *.txt files, one book each, with the year in the file name.
The result is a Hugging Face folder (bf16 weights, tokenizer, training.json, README.md) of at most 8 MB.
"""

import argparse
import math
import re
import shutil
import tarfile
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from modeling_armt.conversion.circumstances import circumstances
from modeling_armt.conversion.pretraining import (
    make_llama,
    pack,
    save_tokenizer,
    token_losses,
    train_for,
    train_tokenizer,
    write_facts,
)


MAX_PARAMETERS, MAX_BYTES = 4_000_000, 8_000_000
SIZES = {"vocab": 2048, "hidden": 160, "layers": 5, "heads": 5, "kv_heads": 5, "intermediate": 432, "context": 256}
# "ť" is an é that an earlier conversion of some of these books got wrong; "_" marks italics.
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "`": "'", "´": "'", "“": '"', "”": '"', "‐": "-", "–": "-", "—": " - ",
                          "―": " - ", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ť": "e", "\xad": "", "_": "",
                          "\f": "\n"})  # fmt: skip
README = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# A small Llama for demonstrations

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} heads, {kv_heads} key-value
heads, intermediate size {intermediate}, context {context}, tied embeddings, bf16) with a byte-level BPE vocabulary
of {vocab}. The demonstration and the tests of this package turn it into an ARMT.

## How it was made
`conversion/demo/train_backbone.py` trained the tokenizer, then the model from scratch: {steps:,} steps of {batch}
sequences of {context} tokens ({tokens_seen:,} tokens) in {train_seconds:.0f} s on {device}, with AdamW, peak
learning rate {lr:g}, cosine schedule with warm-up. `training.json` holds the command and the loss curve.

The sequences are random windows of the books. In {repeat_share:.0%} of them a snippet of {snippet_min} to
{snippet_max} tokens stands a second time further on, in place of the text there, to reward copying from the context.
How far that went is among the numbers below: a model that copies finds the second copy easier than the first.

## Data
{novels} public-domain English novels, dated {first_year}-{last_year}, from "100 English Novels" and ELTeC-eng (whose
mark-up is not in these plain texts). Works published up to 1930 are in the public domain in the United States; other
countries may count from the author's death. Line wraps were undone, quotes and dashes made ASCII, accents dropped.
{train_tokens:,} tokens were for training. Held out, {held_out_tokens:,} tokens: {held_out}.

## Numbers
Of the saved bf16 weights, on {eval_tokens:,} held-out tokens in separate windows of {context}:

| measure | value |
| --- | --- |
| loss | {nats_per_token:.4f} nats/token |
| the same | {bits_per_byte:.4f} bits/byte |
| a {copy_snippet}-token snippet, first time | {copy_first:.4f} nats/token |
| the same snippet, second time in the window | {copy_second:.4f} nats/token |
| the text that stood where the second copy was put | {copy_control:.4f} nats/token |

## Use and limits
For the demonstration and the tests of this package, nothing else. It is a tiny model: its text is fluent for a few
words at best, it knows no facts, and it has the language and the prejudices of its period.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--novels", type=Path, required=True, help="folder or tar archive of *.txt books")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--latest-year", type=int, default=1930, help="leave out books whose file name has a later year")
    add("--held-out", type=int, default=4, help="number of books kept for validation")
    for name, value in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    add("--minutes", type=float, default=5.0, help="training time, compilation included")
    add("--batch", type=int, default=256, help="sequences per step")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=200, help="steps")
    add("--repeat-share", type=float, default=0.15, help="share of windows that repeat a snippet")
    add("--repeat-tokens", type=int, nargs=2, default=(16, 64), metavar=("MIN", "MAX"), help="length of the snippet")
    add("--eval-windows", type=int, default=2048, help="at most so many held-out windows")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="do without torch.compile, for tiny or CPU runs")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    if 3 * args.repeat_tokens[1] > args.context:
        parser.error("--context must hold three snippets of --repeat-tokens")
    return args


def clean(text: str) -> str:
    """One paragraph a line, in ASCII (and the pound sign), so that a small vocabulary is spent on words."""
    text = text.replace("â€”", "—").translate(TO_ASCII)
    text = re.sub(r"[^\x00-\x7f£]", "", unicodedata.normalize("NFKD", text))
    lines = [" ".join(line.split()) for line in text.replace("--", " - ").split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    # A hard-wrapped book has hardly any long line; in it a line well short of the usual length ends a paragraph.
    wrapped = lengths[len(lengths) * 95 // 100] < 120
    full = 0.8 * lengths[len(lengths) // 2] if wrapped else math.inf
    paragraphs, unfinished = [""], False
    for line in lines:
        if not line.strip("* "):  # blank, or a row of asterisks between scenes
            unfinished = False
            continue
        if unfinished:
            paragraphs[-1] += " " + line
        else:
            paragraphs.append(line)
        unfinished = len(line) >= full
    # These books come with "I can't , he said", from contractions spelt apart.
    return re.sub(r" +([,.;:?!])", r"\1", "\n".join(paragraphs[1:])) + "\n"


def year_of(name: str) -> int:
    """The year in a file name, as in Dickens_Bleak_1853 or ENG18400_Trollope."""
    match = re.search(r"1[789]\d\d", name)
    if match is None:
        raise SystemExit(f"no year in the file name {name}")
    return int(match.group())


def read_novels(source: Path, latest_year: int) -> dict[str, str]:
    """Cleaned books by file name, in order of name."""
    if source.is_dir():
        raw = {path.stem: path.read_bytes() for path in source.rglob("*.txt")}
    else:
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.isfile() and member.name.endswith(".txt")]
            raw = {Path(member.name).stem: archive.extractfile(member).read() for member in members}
    names = [name for name in sorted(raw) if year_of(name) <= latest_year]
    return {name: clean(raw[name].decode("utf-8")) for name in tqdm(names, "clean", unit="book", mininterval=2)}


def random_windows(tokens: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Windows of context + 1 tokens from anywhere; in some a snippet stands twice, with other text between."""

    def integers(low: torch.Tensor | int, high: torch.Tensor | int) -> torch.Tensor:  # a column, both ends included
        uniform = torch.rand(args.batch, 1, device=tokens.device, generator=generator, dtype=torch.float64)
        return (low + uniform * (high - low + 1)).long()

    length = args.context + 1
    start = integers(0, len(tokens) - length)
    snippet = integers(*args.repeat_tokens) * (integers(1, 10_000) <= 10_000 * args.repeat_share)
    first = integers(0, length - 2 * snippet)
    second = integers(first + snippet, length - snippet)
    position = torch.arange(length, device=tokens.device)
    in_copy = (position >= second) & (position < second + snippet)
    return tokens[start + position - in_copy * (second - first)]


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, bytes_per_token: float, args: argparse.Namespace) -> dict:
    """Held-out loss, and copying: the windows again, with the snippet at a quarter put a second time at the end."""
    count = min(args.eval_windows, (len(tokens) - 1) // args.context)
    starts = torch.linspace(0, len(tokens) - args.context - 1, count, dtype=torch.float64).long().to(tokens.device)
    windows = tokens[starts[:, None] + torch.arange(args.context + 1, device=tokens.device)]
    first, snippet = args.context // 4, min(32, args.context // 4)
    copies = windows.clone()
    copies[:, -snippet:] = windows[:, first : first + snippet]
    plain, copied = (torch.cat([token_losses(model, part) for part in w.split(64)]) for w in (windows, copies))
    loss = plain.mean().item()
    return {"eval_tokens": plain.numel(), "nats_per_token": loss, "bytes_per_token": bytes_per_token,
            "bits_per_byte": loss / math.log(2) / bytes_per_token, "copy_snippet": snippet,
            "copy_first": plain[:, first - 1 : first - 1 + snippet].mean().item(),
            "copy_second": copied[:, -snippet:].mean().item(),
            "copy_control": plain[:, -snippet:].mean().item()}  # fmt: skip


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    novels = read_novels(args.novels, args.latest_year)
    names = list(novels)
    if not 0 < args.held_out < len(names):
        raise SystemExit(f"cannot hold out {args.held_out} of {len(names)} books")
    held_out = {names[(2 * i + 1) * len(names) // (2 * args.held_out)]: None for i in range(args.held_out)}
    training = [novels[name] for name in names if name not in held_out]

    tokenizer = train_tokenizer(training, args.vocab)
    model = make_llama(tokenizer, vars(args), MAX_PARAMETERS).to(args.device)
    parameters = model.num_parameters()
    folder = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    # Before the time is spent: what users load must be this tokenizer, not the one that a Llama configuration implies.
    save_tokenizer(tokenizer, folder, novels[next(iter(held_out))][:10_000] + "\nZoë paid £1,234 to 東京\n")

    train_tokens = pack(tokenizer, training)
    held_out_tokens = pack(tokenizer, [novels[name] for name in held_out])
    bytes_per_token = sum(len(novels[name].encode()) for name in held_out) / len(held_out_tokens)
    on_device, generator = train_tokens.to(torch.int64).to(args.device), torch.Generator(args.device)
    generator.manual_seed(args.seed)

    def draw() -> tuple[torch.Tensor, None]:
        return random_windows(on_device, args, generator), None

    facts = train_for(model, args.minutes, draw, args.lr, args.warmup, not args.no_compile)
    model.to(torch.bfloat16).save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device)
    facts |= evaluate(saved, held_out_tokens.to(torch.int64).to(args.device), bytes_per_token, args)
    sizes = {name: getattr(args, name) for name in SIZES} | {"vocab": len(tokenizer)}
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    facts = {
        **circumstances(*packages, device=args.device),
        "parameters": parameters, **sizes, "batch": args.batch, "lr": args.lr, "repeat_share": args.repeat_share,
        "snippet_min": args.repeat_tokens[0], "snippet_max": args.repeat_tokens[1], "seed": args.seed,
        "novels": len(names), "first_year": min(map(year_of, names)), "last_year": max(map(year_of, names)),
        "held_out": ", ".join(held_out), "train_tokens": len(train_tokens), "held_out_tokens": len(held_out_tokens),
    } | facts  # fmt: skip
    (folder / "README.md").write_text(README.format(**facts), encoding="utf-8")
    write_facts(folder, facts)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{folder} holds {size:,} bytes, more than {MAX_BYTES:,}")
    folder.rename(args.out)
    print("{steps:,} steps, {tokens_seen:,} tokens, {parameters:,} parameters".format(**facts), f"{size:,} bytes")
    print("held-out loss {nats_per_token:.4f} nats/token, {bits_per_byte:.4f} bits/byte".format(**facts))
    print("{copy_snippet}-token snippet: first {copy_first:.4f}, second {copy_second:.4f} nats/token".format(**facts),
          "(plain text there {copy_control:.4f})".format(**facts))  # fmt: skip


if __name__ == "__main__":
    main()
