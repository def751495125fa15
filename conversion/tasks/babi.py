"""Stories with questions of the bAbI tasks (arXiv 1502.05698): read from their files, or simulated (qa1 to qa3)."""

import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np


T = TypeVar("T")

SUBSETS = ("en", "en-10k")
TASKS = tuple(f"qa{number}" for number in range(1, 21))
GENERATED_TASKS = ("qa1", "qa2", "qa3")

PERSONS = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVE = ("journeyed to", "moved to", "travelled to", "went back to", "went to")
GET = ("got", "grabbed", "picked up", "took")
DROP = ("discarded", "dropped", "left", "put down")

QUESTIONS_PER_STORY = 5
FACTS_PER_BLOCK = 2  # a question may follow every second fact
RECENT_FACTS = 5  # a question is about what one of the last five facts began
THERE = 0.2  # share of facts about objects that end in "there"

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error, OSError, UnicodeDecodeError)


class BabiError(ValueError):
    """bAbI data that is missing or broken, with where and why."""


@dataclass(frozen=True)
class Question:
    """
    A question in a story.

    Attributes:
        text: as printed, without spaces around.
        answer: one word, or words joined by commas.
        supports: indices into the story's facts, as the file orders them; empty where it names none.
        position: how many of the story's facts come before the question.
    """

    text: str
    answer: str
    supports: tuple[int, ...]
    position: int


@dataclass
class Story:
    """Facts in order, and the questions asked between them; `name` is its identity, such as `en/qa1/test/0`."""

    name: str
    facts: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def read_stories(path: str | Path, task: str, side: str, subset: str = "en-10k") -> list[Story]:
    """
    The stories of one file of bAbI v1.2.

    Args:
        path: a folder with `en/` and `en-10k/` somewhere in it, or a .tar, .tar.gz, .tar.xz or .zip archive of one.
        task: `qa1` to `qa20`.
        side: `train` or `test`.
        subset: `en` (1,000 questions to train on) or `en-10k`.

    Raises:
        BabiError: if the data is not there, is damaged, or has a line that is not of the format.
    """
    for value, name, known in ((task, "task", TASKS), (side, "side", ("train", "test")), (subset, "subset", SUBSETS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of: {', '.join(known)}.")
    wanted = re.compile(rf"(?:^|/){re.escape(subset)}/{task}_[^/]*_{side}\.txt$")
    name, content = find_file(Path(path), wanted, f"{subset}/{task}_*_{side}.txt")
    return parse_stories(content, name, f"{subset}/{task}/{side}")


def find_file(path: Path, wanted: re.Pattern, what: str) -> tuple[str, str]:
    """Name and text of the file in a folder or an archive whose name matches."""
    if not path.exists():
        raise BabiError(f"There is no {path}: bAbI v1.2 is expected there, as a folder or an archive.")
    kind = "folder" if path.is_dir() else "archive"
    found = None
    try:
        # To the end, even when it is found: a truncated archive is not to be trusted.
        for name, read in list_files(path):
            if found is None and wanted.search(name):
                found = name, read().decode("utf-8")
    except DAMAGED as error:
        raise BabiError(
            f"{path} cannot be read, the {kind} is damaged or incomplete: {type(error).__name__}: {error}"
        ) from error
    if found is None:
        raise BabiError(f"The {kind} {path} has no {what}: it may be incomplete, or the release may lack that file.")
    return found


def list_files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names of the files in a folder or an archive, with functions that read them; / between folders."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield f"{path.name}/{file.relative_to(path).as_posix()}", file.read_bytes
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                yield info.filename, lambda info=info: archive.read(info)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, lambda member=member: archive.extractfile(member).read()


def parse_stories(content: str, file: str, prefix: str) -> list[Story]:
    """
    Stories from the text of a bAbI file, named `prefix/number`.

    Raises:
        BabiError: naming the file and the line that is not of the format, or ends too early.
    """
    stories: list[Story] = []
    facts_of_lines: dict[int, int] = {}
    expected = 1
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):

        def fail(why: str, number=number, line=line):
            raise BabiError(f"{file}, line {number}: {why}: {line[:80]!r}")

        match = re.fullmatch(r"(\d+) (\S.*)", line)
        if not match:
            fail("expected a line number and a sentence")
        index, text = int(match[1]), match[2]
        if index == 1:
            if stories and not stories[-1].questions:
                fail("a story begins, but the one before has no question")
            stories.append(Story(f"{prefix}/{len(stories)}"))
            facts_of_lines = {}
            expected = 1
        if index != expected:
            fail(f"expected number {expected}")
        expected += 1
        story = stories[-1]
        if "\t" not in text:
            facts_of_lines[index] = len(story.facts)
            story.facts.append(text.strip())
            continue
        parts = text.split("\t")
        if len(parts) != 3 or not parts[0].strip() or not parts[1].strip():
            fail("expected a question, an answer and the numbers of supporting facts between tabs")
        try:
            supports = tuple(facts_of_lines[int(support)] for support in parts[2].split())
        except (KeyError, ValueError):
            fail("expected the numbers of earlier facts of the story")
        story.questions.append(Question(parts[0].strip(), parts[1].strip(), supports, len(story.facts)))
    if not stories:
        raise BabiError(f"{file} is empty.")
    answered = bool(story.questions) and story.questions[-1].position == len(story.facts)
    if not (answered and content.endswith("\n")):
        raise BabiError(f"{file}, line {len(lines)}: the file ends in the middle of a story: {lines[-1][:80]!r}")
    return stories


def generate_stories(task: str, rng: np.random.Generator) -> Iterator[Story]:
    """
    Endless new stories of qa1, qa2 or qa3, with 5 questions each as in bAbI.

    Persons and things start in places that are not told. In each step somebody, who can do something, moves, takes a
    thing that is where they are, or puts one down. After every second fact a question is asked if there is one that
    the story answers, about what one of the last five facts began; so the numbers of facts come out as in bAbI.

    Raises:
        ValueError: for another task.
    """
    if task not in GENERATED_TASKS:
        raise ValueError(f"task is {task!r}; stories can be generated for: {', '.join(GENERATED_TASKS)}.")
    number = 0
    while True:
        yield generate_story(task, rng, f"generated/{task}/{number}")
        number += 1


@dataclass
class Deed:
    """A fact as the simulator knows it; `target` is a place for a move and an object otherwise."""

    person: str
    kind: str
    target: str


def generate_story(task: str, rng: np.random.Generator, name: str) -> Story:
    """One story; the rest as in [`generate_stories`]."""
    story = Story(name)
    deeds: list[Deed] = []
    place_of = {thing: choose(rng, PLACES) for thing in (*PERSONS, *OBJECTS)}
    holder: dict[str, str] = {}
    while len(story.questions) < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_BLOCK):
            deed = next_deed(task, rng, place_of, holder)
            deeds.append(deed)
            story.facts.append(describe(task, deed, rng))
        questions = QUESTIONS[task](deeds)
        if questions:
            story.questions.append(choose(rng, choose(rng, questions)))
    return story


def next_deed(task: str, rng: np.random.Generator, place_of: dict[str, str], holder: dict[str, str]) -> Deed:
    """Draws what happens next from all that somebody can do, and does it."""
    options = []
    for person in PERSONS:
        options.append((person, "move", PLACES))
        if task == "qa1":
            continue
        here = tuple(thing for thing in OBJECTS if thing not in holder and place_of[thing] == place_of[person])
        held = tuple(thing for thing in OBJECTS if holder.get(thing) == person)
        options += [(person, kind, things) for kind, things in (("get", here), ("drop", held)) if things]
    while True:
        person, kind, targets = choose(rng, options)
        target = choose(rng, targets)
        # Who would move to where they are does not move and somebody draws again, so moves are rarer by a sixth.
        if kind != "move" or target != place_of[person]:
            break
    if kind == "move":
        place_of[person] = target
    elif kind == "get":
        holder[target] = person
    else:
        del holder[target]
        place_of[target] = place_of[person]
    return Deed(person, kind, target)


def describe(task: str, deed: Deed, rng: np.random.Generator) -> str:
    """The sentence of a fact."""
    verb = choose(rng, {"move": MOVE, "get": GET, "drop": DROP}[deed.kind])
    there = ""
    if deed.kind != "move":
        always = task == "qa2" and deed.kind == "get"
        there = " there" if always or rng.random() < THERE else ""
    return f"{deed.person} {verb} the {deed.target}{there}."


def ask_where_is_person(deeds: list[Deed]) -> list[list[Question]]:
    """qa1: where somebody is who moved lately; once for each recent move, so busy persons are asked about more."""
    questions = []
    for deed in deeds[-RECENT_FACTS:]:
        last = last_move(deeds, deed.person, len(deeds))
        text = f"Where is {deed.person}?"
        questions.append([Question(text, deeds[last].target, (last,), len(deeds))])
    return questions


def ask_where_is_object(deeds: list[Deed]) -> list[list[Question]]:
    """qa2: where a thing is that was put down lately, or was taken lately and carried elsewhere."""
    questions = []
    for thing, start in recent_handlings(deeds):
        move = last_move(deeds, deeds[start].person, start if deeds[start].kind == "drop" else len(deeds))
        if move is not None and (deeds[start].kind == "drop" or move > start):
            questions.append([Question(f"Where is the {thing}?", deeds[move].target, (start, move), len(deeds))])
    return questions


def ask_where_was_object(deeds: list[Deed]) -> list[list[Question]]:
    """qa3: where a thing was before one of the places that it was last carried to."""
    questions = []
    for thing, start in recent_handlings(deeds):
        person = deeds[start].person
        taken, end = start, len(deeds)
        if deeds[start].kind == "drop":
            taken, end = max(i for i in range(start) if deeds[i] == Deed(person, "get", thing)), start
        moves = [i for i in range(taken, end) if deeds[i].person == person and deeds[i].kind == "move"]
        # A place visited twice is asked about by its last visit.
        last_visit = {deeds[move].target: move for move in moves}
        pairs = [pair for pair in pairwise(moves) if last_visit[deeds[pair[1]].target] == pair[1]]
        asked = [
            Question(
                f"Where was the {thing} before the {deeds[after].target}?",
                deeds[before].target,
                (start, after, before),
                len(deeds),
            )
            for before, after in pairs
        ]
        if asked:
            questions.append(asked)
    return questions


# What can be asked after the deeds so far: a list for each thing or person, of which one is drawn, then one question.
QUESTIONS = {"qa1": ask_where_is_person, "qa2": ask_where_is_object, "qa3": ask_where_was_object}


def recent_handlings(deeds: list[Deed]) -> list[tuple[str, int]]:
    """`(thing, index)` of what was taken or put down in the recent facts, each thing by its last handling."""
    recent = range(max(0, len(deeds) - RECENT_FACTS), len(deeds))
    return list({deeds[index].target: index for index in recent if deeds[index].kind != "move"}.items())


def last_move(deeds: list[Deed], person: str, end: int) -> int | None:
    """Index of a person's last move before `end`."""
    return next((i for i in range(end - 1, -1, -1) if deeds[i].person == person and deeds[i].kind == "move"), None)


def choose(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`; scaling a float is several times faster than drawing an integer."""
    return items[int(rng.random() * len(items))]
