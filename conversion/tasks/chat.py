"""Instruction data: conversations in the format of a tokenizer's chat template, with the loss on the answers."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .documents import hub_rows, side_of
from .streams import SIDES, Samples, finite, passes
from .task import Task


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPECIAL = re.compile(r"<\|\w+\|>")


class Chat(Task):
    """
    A sample is a conversation up to the last answer that fits; `answer` is that answer, and `prompt_length` what comes
    before it. Conversations whose first answer does not fit are left out. Those that start with the same question are
    on the same side.

    Labels follow the template's `{% generation %}` block, or without one, whatever the template adds for an answer
    after its generation prompt, up to the white space behind the end of the turn.

    Args:
        tokenizer: of the model, with a chat template.
        source: a file of one JSON object a line, `{"messages": [{"role": ..., "content": ...}, ...]}`, or the id of a
            data set of the Hub with a column `messages`.
        config, split: of the data set of the Hub.

    Raises:
        FileNotFoundError: if there is no such file or data set.
        ValueError: naming file and line, if one is broken; or if the tokenizer has no chat template, or lacks a
            special token that the template uses.
    """

    name = "chat"
    exact = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | Path,
        config: str | None = None,
        split: str = "train",
    ):
        check_template(tokenizer)
        self.tokenizer, self.source = tokenizer, source
        self._marks_answers = GENERATION.search(tokenizer.get_chat_template()) is not None
        self._lines = None
        if Path(source).exists():
            with open(source, encoding="utf-8", errors="surrogateescape") as file:
                self._lines = [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
            count = len(self._lines)
        else:
            self._rows = hub_rows(str(source), config, split)
            if "messages" not in self._rows.column_names:
                raise ValueError(f"{source} has no column 'messages'; it has: {', '.join(self._rows.column_names)}.")
            count = len(self._rows)
        self._sides: dict[str, list[int]] = {side: [] for side in SIDES}
        for number in range(count):
            messages = self._messages(number)
            first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            asked = [[message["role"], message["content"]] for message in messages[:first]]
            self._sides[side_of(json.dumps(asked))].append(number)

    def _where(self, number: int) -> str:
        if self._lines is None:
            return f"{self.source}, row {number}"
        return f"{self.source}, line {self._lines[number][0]}"

    def _messages(self, number: int) -> list[dict[str, Any]]:
        if self._lines is None:
            sample = self._rows[number]
        else:
            try:
                sample = json.loads(self._lines[number][1])
            except ValueError as error:
                raise ValueError(f"{self._where(number)} is not JSON: {error}") from error
        messages = sample.get("messages") if isinstance(sample, dict) else None
        if not isinstance(messages, list) or not messages:
            raise ValueError(f'{self._where(number)} is not an object with "messages", a list.')
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f'{self._where(number)} has a message without "role" and "content", both texts.')
        if messages[0]["role"] == "assistant":
            raise ValueError(f"{self._where(number)} begins with an answer to nothing.")
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f"{self._where(number)} has no message of the role assistant, so nothing to learn.")
        return messages

    def train(self, length: int, seed: int = 0) -> IterableDataset:
        """
        Raises:
            ValueError: if no conversation has an answer within `length` tokens.
        """
        numbers = self._numbers("train")
        if next(self._samples(length, numbers), None) is None:
            raise ValueError(f"No conversation of {self.source} has an answer within {length} tokens.")
        return passes(partial(self._pass, length, numbers), len(numbers), seed)

    def validation(self, length: int, count: int) -> IterableDataset:
        """`count` conversations of at most `length` tokens, however short; raises `ValueError` if there are fewer."""
        return finite(partial(self._first, length, "validation", count))

    def test(self, length: int, count: int | None) -> IterableDataset:
        """As `validation`; all there are if `count` is None."""
        return finite(partial(self._first, length, "test", count))

    def _numbers(self, side: str) -> np.ndarray:
        return np.array(self._sides[side], dtype=int)

    def _pass(self, length: int, numbers: np.ndarray, order: np.ndarray, number: int) -> Samples:
        return self._samples(length, numbers[order])

    def _first(self, length: int, side: str, count: int | None) -> Samples:
        found = 0
        for sample in self._samples(length, self._numbers(side)):
            if found == count:
                return
            found += 1
            yield sample
        if count is not None and found < count:
            raise ValueError(
                f"{self.source} has {found} conversations for {side} with an answer within {length} tokens, "
                f"not {count}."
            )

    def _samples(self, length: int, numbers: np.ndarray) -> Samples:
        for number in numbers.tolist():
            sample = self._sample(length, number)
            if sample is not None:
                yield sample

    def _sample(self, length: int, number: int) -> dict[str, Any] | None:
        messages = self._messages(number)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        try:
            ids, spans = self._marked(messages) if self._marks_answers else self._rendered(messages)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses {self._where(number)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self._where(number)}: {error}") from error
        if len(spans) != len(answers):
            raise ValueError(
                f"{self._where(number)} has {len(answers)} answers, but the chat template marks {len(spans)} places."
            )
        fitting = [span for span in spans if span[1] <= length]
        if not fitting:
            return None
        start, end = fitting[-1]
        labels = [-100] * end
        for begin, stop in fitting:
            labels[begin:stop] = ids[begin:stop]
        return {
            "input_ids": ids[:end],
            "labels": labels,
            "prompt_length": start,
            "answer": answers[len(fitting) - 1],
            "distances": [],
            "fact_spans": [],
            "group": number,
        }

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and first and last + 1 of each answer, by the template's generation blocks."""
        output = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        edges = np.flatnonzero(np.diff([0, *output["assistant_masks"], 0]))
        return output["input_ids"], [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, by what the template adds for each answer."""
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoded["offset_mapping"])
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = self.tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not whole.startswith(after) or not after.startswith(before):
                raise ValueError(
                    "the chat template does not leave earlier messages as they are when others follow, so answers "
                    "cannot be told from the rest. Give it a {% generation %} block."
                )
            begin, end = len(before), len(after.rstrip())
            inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end) & (offsets[:, 0] < offsets[:, 1]))
            if len(inside):
                spans.append((int(inside[0]), int(inside[-1]) + 1))
        return encoded["input_ids"], spans


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` if a tokenizer has no chat template, or lacks what its template or labels need."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer {name} has no chat template. Use an instruct model's, or set chat_template.")
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer {name} is not a fast one, so answers cannot be found in its texts.")
    template = tokenizer.get_chat_template()
    missing = [
        f"{kind}_token" for kind in ("bos", "eos", "pad", "unk")
        if re.search(rf"\b{kind}_token\b", template) and getattr(tokenizer, f"{kind}_token") is None
    ]  # fmt: skip
    vocabulary = tokenizer.get_vocab()
    missing += sorted({token for token in SPECIAL.findall(template) if token not in vocabulary})
    if missing:
        raise ValueError(f"The chat template of {name} uses tokens that the tokenizer lacks: {', '.join(missing)}.")
