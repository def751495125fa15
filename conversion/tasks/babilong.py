"""
BABILong (arXiv 2406.10149): facts of a bAbI story scattered over books, and a question about them. Its people, places
and things are bAbI's closed list: what was trained on it knows no others.
"""

import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .babi import GENERATED_TASKS, PLACES, TASKS, BabiError, Question, Story, generate_stories, read_stories
from .babilong_scoring import TASK_LABELS, exact_match, label_score
from .background import Background, sentence_prefix
from .task import LengthError, Task, parse_length


# A length of BABILong is in tokens of GPT-2, with this many characters each.
CHARACTERS_PER_TOKEN = 4.4

# What comes out as one table in memory; longer samples, or more, come from a generator.
MOST_TOKENS_A_SAMPLE = 2**20
MOST_TOKENS = 2**25

MAX_NEW_TOKENS = {"base": 10, "instruct": 20}  # as published

HELD_OUT_STORIES = 400  # generated stories to evaluate on, 2,000 questions
MOST_MISSES = 1000  # training samples in a row that do not fit before giving up
EXAMPLES = 3

PROMPT = """\
Below is a long text. Statements about people, things and places are scattered over it; everything else in it is \
unrelated. Answer the question from those statements only, with a single word, or with words separated by commas if \
there are several. Where statements disagree, the later one holds.

Some examples:
{examples}

The text:
<text>
{context}
</text>

Question: {question}
Give the answer and nothing else."""
EXAMPLE = "Statements: {facts}\nQuestion: {question}\nAnswer: {answer}"

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "prompt_length": Value("int64"),
        "answer": Value("string"),
        "distances": List(Value("int64")),
        "fact_spans": List(List(Value("int64"))),
        "group": Value("string"),
        "question": Value("string"),
        "facts": List(Value("string")),
        "gpt2_length": Value("int64"),
    }
)


class Babilong(Task):
    """
    Facts of a story at random places in running text of novels, then a question.

    Samples also have `question`, `facts` (those before the question) and `gpt2_length` (their length in tokens of
    GPT-2, as BABILong states lengths). A sample has exactly the length that is asked for, in tokens of the model;
    with length 0, the only one without a background, it has the facts alone.

    Stories of the three sides share no facts with question, and their texts no book. With `babi`, the test side is
    the test file of en-10k, the validation side the training file of en, and training uses new stories for qa1 to
    qa3 and the training file of en-10k for the other tasks. Without it all stories are new, of qa1 to qa3.
    """

    name = "babilong"

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase | str | Path,
        babi: str | Path | None = None,
        background: str | Path | None = None,
        cache: str | Path | None = None,
        protocol: str = "base",
        prompt_file: str | Path | None = None,
    ):
        """
        Args:
            task: `qa1` to `qa20`.
            tokenizer: the model's, or its folder or Hub id.
            babi: bAbI v1.2, a folder or an archive; None for generated stories only.
            background: see [`Background`]; None for facts alone.
            cache: folder for the tokens of the background; needed with one.
            protocol: `base`, context, question and answer as they are, scored by exact match; or `instruct`, a prompt
                with examples, in the chat template if the tokenizer has one, scored by the labels in the answer.
            prompt_file: a prompt for `instruct` with `{context}` and `{question}`, and `{examples}` if wanted.

        Raises:
            ValueError: for options that do not go together.
            BabiError, BackgroundError: for data that is missing or broken.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; it must be one of: {', '.join(TASKS)}.")
        if protocol not in ("base", "instruct"):
            raise ValueError(f"protocol is {protocol!r}; it must be base or instruct.")
        if babi is None and task not in GENERATED_TASKS:
            raise ValueError(f"Stories of {task} cannot be generated, only {', '.join(GENERATED_TASKS)}: pass babi.")
        if background is not None and cache is None:
            raise ValueError("A background needs a cache folder for its tokens.")
        if prompt_file is not None and protocol != "instruct":
            raise ValueError("A prompt_file is for the instruct protocol.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token, which ends every answer.")
        self.task = task
        self.tokenizer = tokenizer
        self.max_new_tokens = MAX_NEW_TOKENS[protocol]
        self.babi = babi
        self.protocol = protocol
        self.prompt = PROMPT if prompt_file is None else read_prompt(prompt_file)
        self.background = None if background is None else Background(background, tokenizer, cache)
        self.prefix = sentence_prefix(tokenizer)
        self.sentences: dict[str, list[int]] = {}
        self.frames: dict[tuple[str, str], tuple[list[int], list[int], list[int]]] = {}
        self.warned: set[str] = set()
        if babi is not None:
            _ = self.held_out  # fails here if the files are broken

    # `datasets` hashes generators with all that they refer to, which takes seconds with stories; made again, they are
    # the same.
    def __getstate__(self) -> dict[str, Any]:
        made = {"held_out", "held_out_keys", "train_file", "examples"}
        state = {key: value for key, value in self.__dict__.items() if key not in made}
        return state | {"sentences": {}, "frames": {}}

    # Stories

    @cached_property
    def held_out(self) -> dict[str, list[tuple[Story, Question]]]:
        """The questions of the test and validation sides, in an order in which the first ones are of many stories."""
        if self.babi is None:
            sides = {side: self.generate_held_out(side) for side in ("test", "validation")}
        else:
            sides = {
                "test": read_stories(self.babi, self.task, "test", "en-10k"),
                "validation": read_stories(self.babi, self.task, "train", "en"),
            }
        seen: set[tuple] = set()
        result = {}
        for side, stories in sides.items():
            items = [(story, question) for story in stories for question in story.questions]
            items = [item for item in items if sample_key(*item) not in seen]
            seen |= {sample_key(*item) for item in items}
            result[side] = [items[i] for i in self.rng(side, 0).permutation(len(items))]
        return result

    @cached_property
    def held_out_keys(self) -> set[tuple]:
        return {sample_key(*item) for items in self.held_out.values() for item in items}

    def generate_held_out(self, side: str) -> list[Story]:
        stories = generate_stories(self.task, self.rng(f"stories of {side}", 0))
        result = [next(stories) for _ in range(HELD_OUT_STORIES)]
        for story in result:
            story.name = f"{side}/{story.name}"
        return result

    def train_items(self, rng: np.random.Generator) -> Iterator[tuple[Story, Question]]:
        """Endless stories and questions that the other sides do not have."""
        if self.task in GENERATED_TASKS:
            for story in generate_stories(self.task, rng):
                question = story.questions[int(rng.integers(len(story.questions)))]
                if sample_key(story, question) not in self.held_out_keys:
                    yield story, question
        items = self.train_file
        while True:
            for index in rng.permutation(len(items)):
                yield items[index]

    @cached_property
    def train_file(self) -> list[tuple[Story, Question]]:
        stories = read_stories(self.babi, self.task, "train", "en-10k")
        items = [(story, question) for story in stories for question in story.questions]
        items = [item for item in items if sample_key(*item) not in self.held_out_keys]
        if not items:
            raise BabiError(f"All stories of {self.task} to train on are held out for evaluation.")
        return items

    def rng(self, purpose: str, *numbers: int) -> np.random.Generator:
        """A generator of its own for each purpose and numbers, the same every time."""
        return np.random.default_rng([zlib.crc32(f"{self.task} {purpose}".encode()), *numbers])

    # Sides

    def train(self, length: int, seed: int = 0) -> IterableDataset:
        """
        Endless samples of `length` tokens; stories that do not fit are left out.

        Raises:
            LengthError: if none fits, or there is no background to fill the length with.
        """
        next(self.train_fitting(length, seed))  # fails here rather than in a data loader
        self.check_background(length)
        return IterableDataset.from_generator(self.train_samples, gen_kwargs={"length": length, "seed": seed})

    def train_fitting(self, length: int, seed: int) -> Iterator[tuple[Story, Question]]:
        misses = 0
        for story, question in self.train_items(self.rng("training stories", seed)):
            if length and self.shortest(story, question) > length:
                misses += 1
                if misses == MOST_MISSES:
                    raise self.too_short(story, question, length)
                continue
            misses = 0
            yield story, question

    def train_samples(self, length: int, seed: int) -> Iterator[dict[str, Any]]:
        rng = self.rng("training texts", seed)
        for story, question in self.train_fitting(length, seed):
            yield self.sample("train", story, question, length, rng)

    def validation(self, length: int, count: int) -> Dataset | IterableDataset:
        """As [`test`]."""
        return self.held_out_samples("validation", length, count)

    def test(self, length: int, count: int) -> Dataset | IterableDataset:
        """
        `count` samples of `length` tokens, a generator of numpy arrays if they are long or many.

        Questions come again, in other text, where there are fewer than `count`; their groups tell. Stories that do
        not fit are left out with a warning.

        Raises:
            LengthError: as for `train`.
        """
        return self.held_out_samples("test", length, count)

    def held_out_samples(self, side: str, length: int, count: int) -> Dataset | IterableDataset:
        items, fitting = self.held_out[side], self.fitting(side, length)
        if not fitting:
            raise self.too_short(*min(items, key=lambda item: self.shortest(*item)), length)
        self.check_background(length)
        if len(fitting) < len(items):
            self.warn(
                f"fit {side} {length}",
                f"{len(items) - len(fitting)} of {len(items)} {side} questions of {self.task} are left out: their "
                f"facts do not fit into {length:,} tokens.",
            )
        # Lists in `gen_kwargs` would be taken for shards.
        gen_kwargs = {"side": side, "length": length, "count": count}
        if length <= MOST_TOKENS_A_SAMPLE and length * count <= MOST_TOKENS:
            return Dataset.from_list(list(self.generate_side(**gen_kwargs)), features=FEATURES)
        return IterableDataset.from_generator(self.generate_side, gen_kwargs=gen_kwargs)

    def generate_side(self, side: str, length: int, count: int) -> Iterator[dict[str, Any]]:
        items = self.fitting(side, length)
        for number in range(count):
            yield self.sample(side, *items[number % len(items)], length, self.rng(side, 1, number))

    def fitting(self, side: str, length: int) -> list[tuple[Story, Question]]:
        return [item for item in self.held_out[side] if not length or self.shortest(*item) <= length]

    # Samples

    def sample(
        self, side: str, story: Story, question: Question, length: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """One sample of exactly `length` tokens, or of the facts alone if that is 0; ids are int32 arrays."""
        facts = story.facts[: question.position]
        before, after, answer = self.frame(question)
        pieces = [self.encode(fact) for fact in facts]
        room = length - len(before) - len(after) - len(answer) - sum(map(len, pieces))
        if length and room < 0:
            raise self.too_short(story, question, length)
        if not length or self.background is None:
            room = 0
        text, borders = self.draw(side, room, rng)
        # Slots are drawn among facts and borders together, so several facts may stand side by side.
        slots = np.sort(rng.choice(len(borders) - 1 + len(pieces), len(pieces), replace=False))
        slots -= np.arange(len(pieces))
        context, spans, done, position = [], [], 0, len(before)
        for piece, slot in zip(pieces, slots, strict=True):
            border = int(borders[slot])
            context += [text[done:border], piece]
            position += border - done + len(piece)
            spans.append([position - len(piece), position])
            done = border
        ids = np.concatenate([np.asarray(part, np.int32) for part in (before, *context, text[done:], after, answer)])
        labels = np.full_like(ids, -100)
        labels[-len(answer) :] = answer
        prompt_length = len(ids) - len(answer)
        supports = sorted(spans[support] for support in question.supports)
        return {
            "input_ids": ids,
            "labels": labels,
            "prompt_length": prompt_length,
            "answer": question.answer,
            "distances": [prompt_length - end for _, end in supports],
            "fact_spans": supports,
            "group": story.name,
            "question": question.text,
            "facts": facts,
            "gpt2_length": self.gpt2_tokens(len(ids)),
        }

    def draw(self, side: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Background of `count` tokens with the borders of its sentences, and a warning if some of it repeats."""
        if self.background is None:
            return np.empty(0, np.int32), np.zeros(1, np.int64)
        unique = self.unique_background_tokens(side) if count else 0
        if count > unique:
            self.warn(
                f"unique {side}",
                f"Samples with {count:,} tokens of background repeat it: the {side} side has {unique:,} tokens.",
            )
        return self.background.draw(side, count, rng)

    @property
    def train_background(self) -> Callable[[int, np.random.Generator], np.ndarray] | None:
        """Draws text of the books for training, `(count,)` ids, without a fact in it."""
        return None if self.background is None else partial(_draw_train, self.background)

    def frame(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Ids of what comes before and after the context, and of the answer with the end-of-text token."""
        key = question.text, question.answer
        if key not in self.frames:
            self.frames[key] = self.make_frame(question)
        return self.frames[key]

    def make_frame(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        eos = [self.tokenizer.eos_token_id]
        if self.protocol == "base":
            return self.bos, self.encode(question.text), self.encode(question.answer) + eos
        before, after = self.prompt_around_context(question.text)
        if self.tokenizer.chat_template:
            return self.plain(before), self.plain(after), self.plain(question.answer) + eos
        return self.bos + self.plain(before), self.plain(f"{after}\nAnswer:"), self.encode(question.answer) + eos

    def prompt_around_context(self, question: str) -> tuple[str, str]:
        """The instruct prompt, in the chat template if there is one, cut where the context goes."""
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        values = {"examples": self.examples, "question": question, "context": mark}
        # In one pass: what is put in may hold braces itself.
        text = re.sub(r"\{(examples|question|context)\}", lambda match: values[match[1]], self.prompt)
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(mark)
        return before, after

    @cached_property
    def examples(self) -> str:
        """Questions of training stories with their answers, the shortest of some, with different answers if it can."""
        items = self.train_items(self.rng("examples", 0))
        some = sorted((next(items) for _ in range(50)), key=lambda item: item[1].position)
        first: dict[str, tuple[Story, Question]] = {}
        for item in some:
            first.setdefault(item[1].answer, item)
        chosen = (list(first.values()) + [item for item in some if item not in first.values()])[:EXAMPLES]
        return "\n\n".join(
            EXAMPLE.format(facts=" ".join(story.facts[: q.position]), question=q.text, answer=q.answer)
            for story, q in chosen
        )

    @cached_property
    def bos(self) -> list[int]:
        """The token that the tokenizer begins texts with, if it does."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, sentence: str) -> list[int]:
        """Ids of a sentence within running text."""
        if sentence not in self.sentences:
            self.sentences[sentence] = self.plain(self.prefix + sentence)
        return self.sentences[sentence]

    # Lengths

    def check_background(self, length: int) -> None:
        if length and self.background is None:
            raise LengthError(
                f"Without a background there is nothing to fill {length:,} tokens with: pass background, or the "
                "length 0 for facts alone."
            )

    def shortest(self, story: Story, question: Question) -> int:
        """Tokens of a sample without background."""
        facts = sum(len(self.encode(fact)) for fact in story.facts[: question.position])
        return facts + sum(len(part) for part in self.frame(question))

    def too_short(self, story: Story, question: Question, length: int) -> LengthError:
        return LengthError(
            f"{length:,} tokens are too few for {self.task}: the {question.position} facts of {story.name} with "
            f"question and answer take {self.shortest(story, question):,}."
        )

    @property
    def characters_per_token(self) -> float:
        """Of the model's tokens, in the background; GPT-2's without one."""
        return self.background.characters_per_token if self.background else CHARACTERS_PER_TOKEN

    def tokens_of(self, length: str) -> int:
        return self.tokens(parse_length(length))

    def tokens(self, gpt2_tokens: int) -> int:
        """A length in tokens of GPT-2, as from [`parse_length`], in those of the model."""
        return round(gpt2_tokens * CHARACTERS_PER_TOKEN / self.characters_per_token)

    def gpt2_tokens(self, tokens: int) -> int:
        """A length in tokens of the model in those of GPT-2."""
        return round(tokens * self.characters_per_token / CHARACTERS_PER_TOKEN)

    def unique_background_tokens(self, side: str) -> int:
        """How much background a side has before it repeats."""
        return self.background.unique_tokens(side) if self.background else 0

    def warn(self, key: str, message: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, stacklevel=2)

    # Scores

    def filling(self, prompt: np.ndarray, start: int, end: int, rng: np.random.Generator) -> np.ndarray:
        """Other background; nothing where there is none, so that the prompt gets shorter."""
        return self.draw("test", end - start, rng)[0]

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """By exact match in the base protocol, by labels in the other."""
        if self.protocol == "base":
            return float(exact_match(sample["answer"], output, self.tokenizer.eos_token))
        return float(label_score(self.task, sample["question"], sample["answer"], output))

    def baselines(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """
        `chance` among the task's labels; `majority`, the most frequent answer of these samples; for qa1 to qa3
        `last_location`, the place that the facts mention last.
        """
        if not samples:
            raise ValueError("There are no samples to compute baselines on.")
        answers = Counter(sample["answer"] for sample in samples)
        result = {"chance": 1 / len(TASK_LABELS[self.task]), "majority": max(answers.values()) / len(samples)}
        if self.task in GENERATED_TASKS:
            hits = sum(last_place(sample["facts"]) == sample["answer"] for sample in samples)
            result["last_location"] = hits / len(samples)
        return result


def sample_key(story: Story, question: Question) -> tuple:
    """What makes two samples the same, whatever text is around."""
    return (*story.facts[: question.position], question.text)


def last_place(facts: list[str]) -> str | None:
    """The place that is mentioned last."""
    places = re.findall("|".join(PLACES), " ".join(facts))
    return places[-1] if places else None


def read_prompt(path: str | Path) -> str:
    """A prompt template from a file, with the fields that it must have."""
    text = Path(path).read_text(encoding="utf-8")
    missing = [field for field in ("{context}", "{question}") if field not in text]
    if missing or text.count("{context}") > 1:
        problem = f"lacks {' and '.join(missing)}" if missing else "has {context} more than once"
        raise ValueError(f"The prompt {path} {problem}; it needs {{context}} once and {{question}}.")
    return text


def _draw_train(background: Background, count: int, rng: np.random.Generator) -> np.ndarray:
    return background.draw("train", count, rng)[0]
