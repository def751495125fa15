"""
Random programs: texts read in chunks, with padding, by tokens, as streams, in both schedules; conversations that are
forked, copied, saved, loaded, reordered, searched by beams, asked by many rows at once and disturbed by calls that
fail. Whatever was done on the way, every logit is that of its row alone, uncached and in one call, in float64.
"""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, tiny_model
from helpers import difference

from modeling_armt import ARMTCache, ARMTForCausalLM, decode_armt


TOLERANCE = 1e-9
MODELS = {
    "llama": {},
    "gemma3_text": {},
    "gpt2": {"segment_size": 4, "num_mem_tokens": 2},
    "qwen2": {"memory_layers": [1], "segment_size": 5},
}
PROGRAMS = 25  # of each model
STEPS = 6


@dataclass
class Conversation:
    """A cache, what each of its rows has read, and the logits that came back, `(tokens read, logits)`."""

    cache: ARMTCache
    rows: list[list[int]]
    answers: list[list[tuple[int, torch.Tensor]]] = field(default_factory=list)

    def copy(self, cache: ARMTCache) -> "Conversation":
        return Conversation(cache, [list(row) for row in self.rows], [list(of_row) for of_row in self.answers])


class Program:
    """One random program; the seed tells all of it."""

    def __init__(self, model: ARMTForCausalLM, seed: int, folder: Path):
        self.model, self.random, self.folder = model, random.Random(seed), folder
        self.log = [f"seed {seed}"]
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.conversations = [self.begin()]

    def run(self) -> None:
        steps = (
            *(self.read, self.read, self.read, self.decode, self.decode, self.stream, self.fork, self.save),
            *(self.reorder, self.ask_with_many_rows, self.generate, self.fail),
        )
        for _ in range(STEPS):
            step, number = self.random.choice(steps), self.random.randrange(len(self.conversations))
            self.log.append(f"{step.__name__} of {number}")
            step(self.conversations[number])
        for conversation in self.conversations:
            self.check(conversation)

    def check(self, conversation: Conversation) -> None:
        for row, answers in zip(conversation.rows, conversation.answers, strict=True):
            if answers:
                alone = self.alone(tuple(row))
                places, found = zip(*answers, strict=True)
                error = difference(torch.stack(found), alone[torch.tensor(places) - 1])
                assert error <= TOLERANCE, f"off by {error:.1e}: {self.log}"
        lengths = [len(row) for row in conversation.rows]
        assert conversation.cache.tokens == lengths, self.log
        assert [n % self.model.config.segment_size for n in lengths] == conversation.cache.opened, self.log

    def alone(self, row: tuple[int, ...]) -> torch.Tensor:
        if row not in self.known:  # forks have rows in common
            self.known[row] = self.model(torch.tensor([row]), use_cache=False).logits[0]
        return self.known[row]

    # Steps

    def begin(self) -> Conversation:
        rows = self.random.randint(1, 3)
        conversation = Conversation(ARMTCache(), [[] for _ in range(rows)], [[] for _ in range(rows)])
        self.read(conversation)
        return conversation

    def read(self, conversation: Conversation, columns: int | None = None, schedule: str | None = "any") -> None:
        """A chunk with padding anywhere, more of it in some rows than in others."""
        rows, begins = len(conversation.rows), conversation.cache.batch_size < 1
        columns = columns or self.random.randint(1, 20)
        share = self.random.choice([1.0, 1.0, 0.7, 0.2])
        real = [[self.random.random() < share for _ in range(columns)] for _ in range(rows)]
        for row in real:
            row[self.random.randrange(columns)] |= begins  # the call that begins a text reads some of every row
        ids = self.ids(rows, columns)
        options = {} if all(map(all, real)) else {"attention_mask": torch.tensor(real).long()}
        schedule = self.random.choice(["sequential", "diagonal", None]) if schedule == "any" else schedule
        options |= {} if schedule is None else {"schedule": schedule}
        self.log.append(f"{columns} columns, real {real}, {schedule}")
        logits = self.model(ids, cache=conversation.cache, **options).logits
        for number, row in enumerate(conversation.rows):
            for column in range(columns):
                if real[number][column]:
                    row.append(int(ids[number, column]))
                if row:  # a pad has the answer of what was read last
                    conversation.answers[number].append((len(row), logits[number, column]))

    def decode(self, conversation: Conversation) -> None:
        """Token by token, in the buffers of the fast step."""
        for _ in range(self.random.randint(1, 6)):
            self.read(conversation, 1, None)

    def stream(self, conversation: Conversation) -> None:
        ids = self.ids(len(conversation.rows), self.random.randint(1, 30))
        blocks = self.random.randint(1, 3)
        logits = self.model.read(ids, conversation.cache, block_segments=blocks).logits
        for row, answers, new, logit in zip(
            conversation.rows, conversation.answers, ids.tolist(), logits[:, -1], strict=True
        ):
            row += new
            answers.append((len(row), logit))

    def fork(self, conversation: Conversation) -> None:
        duplicate = self.random.choice([ARMTCache.fork, copy.deepcopy])
        self.conversations.append(conversation.copy(duplicate(conversation.cache)))

    def save(self, conversation: Conversation) -> None:
        path = self.folder / "memory.safetensors"
        self.model.save_memory(conversation.cache, path)
        self.conversations.append(conversation.copy(self.model.load_memory(path)))

    def reorder(self, conversation: Conversation) -> None:
        """What beams do to rows."""
        rows = len(conversation.rows)
        if rows == 1:
            conversation.cache.batch_repeat_interleave(2)
            index = [0, 0]
        else:
            index = [self.random.randrange(rows) for _ in range(self.random.randint(1, rows))]
            conversation.cache.reorder_cache(torch.tensor(index))
        self.log.append(f"rows {index}")
        conversation.rows = [list(conversation.rows[i]) for i in index]
        conversation.answers = [list(conversation.answers[i]) for i in index]

    def ask_with_many_rows(self, conversation: Conversation) -> None:
        """A fork of one row's memory that several rows go on from."""
        row = self.random.randrange(len(conversation.rows))
        cache = conversation.cache.fork()
        cache.batch_select_indices(torch.tensor([row]))
        asked = Conversation(cache, [list(conversation.rows[row]) for _ in range(3)], [[] for _ in range(3)])
        self.read(asked)
        self.conversations.append(asked)

    def generate(self, conversation: Conversation) -> None:
        """An answer by beams: their scores are those of the tokens that they took."""
        prompt, beams, new = self.ids(len(conversation.rows), 2), 2, 5
        fork = conversation.cache.fork()
        fork.batch_repeat_interleave(beams)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
        output = self.model.generate(
            prompt, cache=fork, max_new_tokens=new, num_beams=beams, output_scores=True, **options
        )
        for row, sequence, score in zip(conversation.rows, output.sequences, output.sequences_scores, strict=True):
            chances = self.alone((*row, *sequence[:-1].tolist()))[-new:].log_softmax(-1)
            taken = chances.gather(1, sequence[-new:, None]).mean()
            assert abs(taken - score) <= 1e-5, f"scored {score}, is {taken}: {self.log}"  # scores are float32

    def fail(self, conversation: Conversation) -> None:
        """A call that cannot be answered, which nothing may remember."""
        ids = self.ids(len(conversation.rows), 9)
        handle = self.model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.model(ids[:, : self.random.choice([1, 9])], cache=conversation.cache)
        handle.remove()

    def ids(self, rows: int, columns: int) -> torch.Tensor:
        return torch.tensor([[self.random.randrange(3, VOCABULARY) for _ in range(columns)] for _ in range(rows)])


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_random_programs(name: str, fast: bool, tmp_path, monkeypatch):
    model = tiny_model(name, **MODELS[name])
    if fast:  # the same code without waiting for a compiler
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        for setting, value in {"DEVICES": {"cpu"}, "READS_AHEAD": {"cpu"}, "COMPILES": False}.items():
            monkeypatch.setattr(decode_armt, setting, value)
        model.compile_armt()
    for seed in range(PROGRAMS):
        program = Program(model, seed, tmp_path)
        try:
            program.run()
        except Exception as error:
            raise AssertionError(f"{name}: {program.log}") from error
