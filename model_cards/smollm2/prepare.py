"""
What the search needs, as files that need neither gguf nor transformers to be read.

    python prepare.py FOLDER/FILE.gguf BABI_ARCHIVE NOVEL.txt OUT

OUT/weights.pt has the quantised blocks of the GGUF, with the first 16,384 rows of the vocabulary and those in use;
OUT/stories.pt the stories of bAbI qa1 as lists of (fact, person, place), with token ids renumbered to these rows;
OUT/whole.pt the same with the ids of the whole vocabulary.
"""

import sys
import tarfile
from pathlib import Path

import gguf
import torch
from transformers import AutoTokenizer


ROWS = 16384


def read_stories(archive: Path, novel: Path, encode) -> dict:
    data = {"filler": encode(novel.read_text(encoding="utf-8")[20000:620000])}
    for side in ("train", "test"):
        stories = data[side] = []
        with tarfile.open(archive) as tar:
            text = tar.extractfile(f"en-10k/qa1_single-supporting-fact_{side}.txt").read().decode()
        for line in text.splitlines():
            number, fact = line.split(" ", 1)
            if number == "1":
                stories.append([])
            if "\t" not in fact:  # not a question
                words = fact.strip().rstrip(".").split()
                stories[-1].append((encode(" " + fact.strip()), words[0], encode(" " + words[-1])[0]))
    people = sorted({person for story in data["train"] for _, person, _ in story})
    data["name"] = {person: encode(" " + person) for person in people}
    data["ask"] = {person: encode(f"\nQuestion: Where is {person}? Answer:") for person in people}
    return data


def main():
    file, archive, novel, out = (Path(argument) for argument in sys.argv[1:5])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    data = read_stories(archive, novel, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    torch.save(data, out / "whole.pt")
    sequences = [data["filler"], *data["name"].values(), *data["ask"].values()]
    sequences += [[*fact, place] for side in ("train", "test") for story in data[side] for fact, _, place in story]
    kept = sorted({*range(ROWS), *(token for sequence in sequences for token in sequence)})
    new = {token: number for number, token in enumerate(kept)}

    def renumbered(tokens):
        return [new[token] for token in tokens]

    stories = {"filler": renumbered(data["filler"])}
    for side in ("train", "test"):
        stories[side] = [[(renumbered(f), who, new[place]) for f, who, place in story] for story in data[side]]
    for kind in ("name", "ask"):
        stories[kind] = {person: renumbered(tokens) for person, tokens in data[kind].items()}
    torch.save(stories, out / "stories.pt")
    blocks = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(tensor.data.copy())
        blocks[tensor.name] = tensor.tensor_type.name, values[kept] if tensor.name == "token_embd.weight" else values
    torch.save(blocks, out / "weights.pt")


if __name__ == "__main__":
    main()
