"""BABILong: stories, background, samples and scorers."""

import gzip
import itertools
import json
import pickle
import re
import shutil
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from modeling_armt.conversion.tasks import background as background_module
from modeling_armt.conversion.tasks.babi import (
    GENERATED_TASKS,
    TASKS,
    BabiError,
    Question,
    Story,
    generate_stories,
    parse_stories,
    read_stories,
)
from modeling_armt.conversion.tasks.babilong import Babilong, LengthError, parse_length, sample_key
from modeling_armt.conversion.tasks.babilong_scoring import TASK_LABELS, contains_score, exact_match, label_score
from modeling_armt.conversion.tasks.background import Background, BackgroundError, split_sentences
from modeling_armt.conversion.tasks.documents import SHARES, read_documents, side_of_book


DEMO = Path(__file__).parents[1] / "conversion" / "demo" / "backbone"
STORY = "1 Mary went to the office.\n2 John moved to the garden.\n3 Where is Mary? \toffice\t1\n"
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def babi(shared, tmp_path_factory):
    """bAbI unpacked."""
    folder = tmp_path_factory.mktemp("babi")
    with tarfile.open(shared / "data" / "babi-v1.2.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Twelve invented books on all sides, in which every sentence is told from every other."""
    folder = tmp_path_factory.mktemp("books")
    for book in range(12):
        sentences = [f"In year {i} of book {book} the rain fell on {i * 7 % 89} roofs." for i in range(150)]
        (folder / f"book {book}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def qa1(tokenizer, books, cache):
    """Without any files of bAbI."""
    return Babilong("qa1", tokenizer, background=books, cache=cache)


def first(dataset, count):
    return list(itertools.islice(dataset, count))


class TestScoring:
    def test_published_verdicts(self, shared):
        with gzip.open(shared / "golden" / "babilong_scores.json.gz") as file:
            golden = json.load(file)
        assert {task: tuple(labels) for task, labels in golden["labels"].items()} == TASK_LABELS
        assert len(golden["cases"]) == 5000
        for case in golden["cases"]:
            args = case["target"], case["output"]
            assert label_score(case["task"], case["question"], *args) == case["label_score"], case
            assert contains_score(*args) == case["contains_score"], case

    @pytest.mark.parametrize(
        ("output", "right"),
        [
            (" garden", True),
            ("garden<|endoftext|>kitchen", True),
            ("garden.", False),
            ("Garden", False),
            ("the garden", False),
            ("", False),
        ],
    )
    def test_exact_match(self, output, right):
        assert exact_match("garden", output, "<|endoftext|>") == right


class TestReading:
    def test_story(self):
        assert parse_stories(STORY, "file", "x") == [
            Story(
                "x/0",
                ["Mary went to the office.", "John moved to the garden."],
                [Question("Where is Mary?", "office", (0,), 2)],
            )
        ]

    def test_archives_and_folder_are_the_same(self, shared, babi, tmp_path):
        archives = [shared / "data" / "babi-v1.2.tar.xz"]
        small = tmp_path / "small"
        (small / "tasks" / "en-10k").mkdir(parents=True)
        shutil.copy(next((babi / "en-10k").glob("qa2_*_test.txt")), small / "tasks" / "en-10k")
        for kind in ("gztar", "zip"):
            archives.append(shutil.make_archive(str(tmp_path / kind), kind, small))
        expected = read_stories(babi, "qa2", "test")
        assert len(expected) == 200
        for path in [*archives, small]:
            assert read_stories(path, "qa2", "test") == expected

    @pytest.mark.parametrize("task", TASKS)
    def test_files(self, babi, task):
        """The numbers of questions that bAbI states, and every answer made of the scorer's labels or their parts."""
        labels = {part for label in TASK_LABELS[task] for part in (label, *label.split(","))}
        for side, subset, count in (("train", "en", 1000), ("test", "en-10k", 1000)):
            questions = [question for story in read_stories(babi, task, side, subset) for question in story.questions]
            assert len(questions) == count
            assert {part for question in questions for part in question.answer.split(",")} <= labels
        if task in ("qa1", "qa20"):
            assert sum(len(story.questions) for story in read_stories(babi, task, "train", "en-10k")) == 10_000

    def test_missing_file_is_named(self, babi):
        with pytest.raises(BabiError, match=r"no en-10k/qa3_\*_train.txt"):
            read_stories(babi, "qa3", "train")
        with pytest.raises(BabiError, match="There is no .*nowhere"):
            read_stories(babi / "nowhere", "qa3", "train")
        with pytest.raises(ValueError, match="task is 'qa21'"):
            read_stories(babi, "qa21", "train")

    def test_truncated_archives(self, shared, babi, tmp_path):
        whole = (shared / "data" / "babi-v1.2.tar.xz").read_bytes()
        zipped = shutil.make_archive(str(tmp_path / "whole"), "zip", babi, "en")
        # The wanted file stands in the first half of the .tar.xz and could be read.
        for name, content in (("cut.tar.xz", whole), ("cut.zip", Path(zipped).read_bytes())):
            (tmp_path / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(BabiError, match=f"{name} cannot be read, the archive is damaged or incomplete"):
                read_stories(tmp_path / name, "qa9", "train", "en")

    @pytest.mark.parametrize(
        ("content", "line", "why"),
        [
            (STORY.replace("2 John", "John"), 2, "expected a line number"),
            (STORY.replace("2 John", "4 John"), 2, "expected number 2"),
            (STORY.replace("\t1", ""), 3, "expected a question"),
            (STORY.replace("\t1", "\t3"), 3, "numbers of earlier facts"),
            (STORY.replace("\t1", "\tx"), 3, "numbers of earlier facts"),
            ("1 Mary went.\n1 John went.\n", 2, "the one before has no question"),
            (STORY + STORY[:27], 4, "ends in the middle of a story"),
            (STORY.rstrip("\n"), 3, "ends in the middle of a story"),
            ("0 Mary went.\n", 1, "expected number 1"),
        ],
    )
    def test_broken_line_is_named(self, tmp_path, content, line, why):
        (tmp_path / "en").mkdir()
        (tmp_path / "en" / "qa1_x_test.txt").write_text(content)
        with pytest.raises(BabiError, match=rf"qa1_x_test.txt, line {line}: .*{why}"):
            read_stories(tmp_path, "qa1", "test", "en")

    def test_empty_file(self, tmp_path):
        (tmp_path / "en").mkdir()
        (tmp_path / "en" / "qa1_x_test.txt").touch()
        with pytest.raises(BabiError, match="is empty"):
            read_stories(tmp_path, "qa1", "test", "en")


def simulate(story: Story, question: Question) -> str:
    """The answer by reading the facts' sentences, in other words than the generator's."""
    place, holder, visits = {}, {}, {}
    for fact in story.facts[: question.position]:
        person, verb, thing = re.fullmatch(r"(\w+) (.+) the (\w+)(?: there)?\.", fact).groups()
        if verb.endswith(" to"):
            place[person] = thing
            for carried in [item for item, owner in holder.items() if owner == person]:
                place[carried] = thing
                visits.setdefault(carried, []).append(thing)
        elif verb in ("got", "grabbed", "picked up", "took"):
            assert thing not in holder
            holder[thing] = person
            visits.setdefault(thing, []).append(place.get(person))
        else:
            assert holder.pop(thing) == person
            place[thing] = place.get(person)
    person = re.fullmatch(r"Where is (?:the )?(\w+)\?", question.text)
    if person:
        return place[person[1]]
    thing, later = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question.text).groups()
    seen = visits[thing]
    last = len(seen) - 1 - seen[::-1].index(later)
    # Taken again where it lay, a thing has not moved.
    return next(earlier for earlier in reversed(seen[:last]) if earlier != later)


def distributions(stories: list[Story], step: int) -> dict[str, Counter]:
    """What is compared between stories: facts a story, questions and how late they are, answers, verbs, persons."""
    facts = [re.fullmatch(r"(\w+) (.+?) the \w+( there)?\.", fact).groups() for s in stories for fact in s.facts]
    return {
        "facts": Counter(len(story.facts) // step for story in stories),
        "questions": Counter(q.text for s in stories for q in s.questions),
        "gaps": Counter(min(q.position - max(q.supports), 10) for s in stories for q in s.questions),
        "answers": Counter(q.answer for s in stories for q in s.questions),
        "verbs": Counter((verb, there) for _, verb, there in facts),
        "persons": Counter(person for person, _, _ in facts),
    }


def total_variation(a: Counter, b: Counter) -> float:
    sizes = sum(a.values()), sum(b.values())
    return sum(abs(a[key] / sizes[0] - b[key] / sizes[1]) for key in a | b) / 2


class TestGenerator:
    @pytest.mark.parametrize("task", GENERATED_TASKS)
    def test_answers(self, task):
        for story in itertools.islice(generate_stories(task, np.random.default_rng(5)), 150):
            assert len(story.questions) == 5
            for question in story.questions:
                assert question.answer == simulate(story, question), (story, question)
                assert len(question.supports) == int(task[2:])
                assert max(question.supports) < question.position
                assert question.answer in story.facts[question.supports[-1]]

    @pytest.mark.parametrize("task", GENERATED_TASKS)
    def test_simulator_agrees_with_babi(self, babi, task):
        for story in read_stories(babi, task, "test"):
            for question in story.questions:
                assert question.answer == simulate(story, question)

    @pytest.mark.parametrize(("task", "step", "bound"), [("qa1", 1, 0.06), ("qa2", 2, 0.09), ("qa3", 16, 0.12)])
    def test_distributions(self, babi, task, step, bound):
        """Of qa3 bAbI has 400 stories only, whose halves differ by as much; their facts are counted in steps."""
        subsets = [("train", "en"), ("test", "en-10k")] if task == "qa3" else [("train", "en-10k")]
        real = [story for side, subset in subsets for story in read_stories(babi, task, side, subset)]
        made = list(itertools.islice(generate_stories(task, np.random.default_rng(0)), 800))
        expected, found = distributions(real, step), distributions(made, step)
        distances = {name: total_variation(expected[name], found[name]) for name in expected}
        assert max(distances.values()) < bound, distances

    def test_same_seed_same_stories(self):
        def make(seed):
            return list(itertools.islice(generate_stories("qa3", np.random.default_rng(seed)), 5))

        assert make(1) == make(1) != make(2)

    def test_other_tasks(self):
        with pytest.raises(ValueError, match="qa1, qa2, qa3"):
            next(generate_stories("qa4", np.random.default_rng(0)))


class TestBackground:
    def test_sentences(self):
        text = 'He  went\nhome. "Why?" she said. "No!" Then he\nslept.\n\nCHAPTER I\n\nMr. was 3.5 long. so'
        assert split_sentences(text) == [
            "He went home.",
            '"Why?" she said.',
            '"No!"',
            "Then he slept.",
            "CHAPTER I",
            "Mr. was 3.5 long. so",
        ]

    def test_tokens_are_the_text(self, books, tokenizer, cache):
        background = Background(books, tokenizer, cache)
        assert len(background.books) == 12
        name, start, end = background.books[0]
        ids = background.ids[background.offsets[start] : background.offsets[end]]
        assert tokenizer.decode(ids).strip() == (books / f"{name}.txt").read_text()
        assert background.ids.dtype == np.uint16
        total = sum(len(file.read_text()) + 1 for file in books.iterdir())
        assert background.characters == total

    def test_archive_is_as_the_folder(self, books, tokenizer, cache, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "books"), "xztar", books)
        a, b = Background(books, tokenizer, cache), Background(archive, tokenizer, cache)
        assert a.folder != b.folder
        assert sorted(book[0] for book in a.books) == sorted(book[0] for book in b.books)
        assert len(a.ids) == len(b.ids)

    def test_novels(self, shared, tokenizer, tmp_path):
        """Two of the real novels, from their archive."""
        with tarfile.open(shared / "data" / "novels.tar.xz") as archive:
            names = list(itertools.islice((member for member in archive if member.isfile()), 2))
            archive.extractall(tmp_path / "novels", members=names, filter="data")
        background = Background(tmp_path / "novels", tokenizer, tmp_path / "cache")
        lengths = np.diff(background.offsets)
        assert len(background.books) == 2 and len(lengths) > 1000
        assert 10 < np.median(lengths) < 60

    def test_cache_is_reused(self, books, tokenizer, cache, monkeypatch):
        Background(books, tokenizer, cache)
        monkeypatch.setattr(background_module, "build_cache", lambda *_: pytest.fail("tokenized again"))
        Background(books, tokenizer, cache)

    def test_changed_book_is_read_again(self, tokenizer, tmp_path):
        (tmp_path / "books").mkdir()
        sizes = []
        for text in ("One day.", "One day. Then another."):
            (tmp_path / "books" / "a.txt").write_text(text)
            sizes.append(len(Background(tmp_path / "books", tokenizer, tmp_path / "cache").offsets) - 1)
        assert sizes == [1, 2]
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_cache_is_atomic(self, books, tokenizer, tmp_path, monkeypatch):
        class Killed(BaseException):
            pass

        def broken(source, read=background_module.read_books):
            yield from itertools.islice(read(source), 3)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(background_module, "read_books", broken)
            Background(books, tokenizer, tmp_path)
        assert not list(tmp_path.iterdir())
        assert len(Background(books, tokenizer, tmp_path).books) == 12
        assert len(list(tmp_path.iterdir())) == 1

    def test_another_process_was_faster(self, books, tokenizer, tmp_path, monkeypatch):
        def slow(source, read=background_module.read_books):
            monkeypatch.setattr(background_module, "read_books", read)
            Background(books, tokenizer, tmp_path)
            yield from read(source)

        monkeypatch.setattr(background_module, "read_books", slow)
        assert len(Background(books, tokenizer, tmp_path).books) == 12
        assert len(list(tmp_path.iterdir())) == 1

    def test_sides(self):
        names = [f"Author_Title{i}_18{i % 90:02}" for i in range(5000)]
        shares = Counter(side_of_book(name) for name in names)
        assert all(abs(shares[side] / 5000 - share) < 0.03 for side, share in SHARES.items())
        assert [side_of_book(name) for name in ("Woolf_Years_1937", "Cbronte_Jane_1847")] == ["test", "train"]

    def test_books_are_on_the_side_that_other_tasks_have_them_on(self, books, tokenizer, cache):
        background, documents = Background(books, tokenizer, cache), read_documents(books)
        for side in SHARES:
            names = [name.removesuffix(".txt") for name in documents.side(side).names]
            assert sorted(names) == sorted(name for name, _, _ in background.side(side))

    def test_draw(self, books, tokenizer, cache):
        background = Background(books, tokenizer, cache)
        unique = background.unique_tokens("test")
        rng = np.random.default_rng(0)
        for count in (0, 1, 300, unique, unique + 100, 3 * unique):
            ids, borders = background.draw("test", count, rng)
            assert len(ids) == count == borders[-1] and borders[0] == 0
            assert (np.diff(borders) > 0).all()
        once = re.findall(r"In year \d+ of book \d+", tokenizer.decode(background.draw("test", unique, rng)[0]))
        assert len(once) == len(set(once)) == 150 * len(background.side("test"))
        starts = {tokenizer.decode(background.draw("train", 8, rng)[0]) for _ in range(30)}
        assert len(starts) > 20

    def test_hub_dataset(self, tokenizer, tmp_path, monkeypatch):
        rows = [{"short_book_title": f"T{i}", "text": f"This is {i}. It is long."} for i in range(3)]
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
        assert [book[0] for book in Background("some/books", tokenizer, tmp_path).books] == ["T0", "T1", "T2"]
        rows[0] = {"content": "x"}
        with pytest.raises(BackgroundError, match="no column `text`; it has: content"):
            Background("other/books", tokenizer, tmp_path)

    def test_errors(self, books, tokenizer, tmp_path):
        with pytest.raises(BackgroundError, match="There is no"):
            Background(tmp_path / "nowhere", tokenizer, tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(BackgroundError, match="holds no text"):
            Background(tmp_path / "empty", tokenizer, tmp_path / "cache")
        whole = Path(shutil.make_archive(str(tmp_path / "whole"), "xztar", books)).read_bytes()
        (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BackgroundError, match="damaged or incomplete"):
            Background(tmp_path / "cut.tar.xz", tokenizer, tmp_path / "cache")
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "Woolf_Years_1937.txt").write_text("One day.")
        with pytest.raises(BackgroundError, match="None of the 1 books of the background falls on the train side"):
            Background(tmp_path / "one", tokenizer, tmp_path / "cache").side("train")

    def test_pickled_without_its_tokens(self, qa1):
        assert len(pickle.dumps(qa1.background)) < 1000
        copy = pickle.loads(pickle.dumps(qa1.background))
        assert (copy.ids == qa1.background.ids).all()


class TestLength:
    @pytest.mark.parametrize(
        ("text", "length"),
        [("0k", 0), ("4k", 4000), ("128k", 128_000), ("1M", 10**6), ("50m", 5 * 10**7), ("1.5k", 1500), ("77", 77)],
    )
    def test_parse(self, text, length):
        assert parse_length(text) == length

    @pytest.mark.parametrize("text", ["", "k", "4kb", "-1k", "4 k x", "four"])
    def test_not_a_length(self, text):
        with pytest.raises(LengthError, match="lengths look like"):
            parse_length(text)

    def test_in_both_kinds_of_tokens(self, qa1):
        length = qa1.tokens(4000)
        assert length * qa1.characters_per_token == pytest.approx(4000 * 4.4, rel=0.001)
        assert qa1.gpt2_tokens(length) == pytest.approx(4000, abs=1)
        assert qa1.test(length, 1)[0]["gpt2_length"] == pytest.approx(4000, abs=1)

    def test_exact(self, qa1):
        for length in (200, 512, 3001):
            for sample in [*qa1.test(length, 3), *qa1.validation(length, 3), *first(qa1.train(length), 3)]:
                assert len(sample["input_ids"]) == len(sample["labels"]) == length

    def test_facts_only(self, qa1, tokenizer):
        for sample in [*qa1.test(0, 5), *first(qa1.train(0), 5)]:
            text = " ".join([*sample["facts"], sample["question"], sample["answer"]])
            assert tokenizer.decode(sample["input_ids"], skip_special_tokens=True).strip() == text

    def test_too_short(self, qa1):
        for make in (lambda: qa1.test(10, 2), lambda: qa1.train(10)):
            with pytest.raises(LengthError, match=r"10 tokens are too few for qa1: the \d+ facts of .* take \d+"):
                make()

    def test_stories_that_do_not_fit_are_left_out(self, qa1):
        limit = int(np.median([qa1.shortest(*item) for item in qa1.held_out["test"]]))
        with pytest.warns(UserWarning, match="of 2000 test questions of qa1 are left out"):
            samples = qa1.test(limit, 20)
        assert {len(sample["input_ids"]) for sample in samples} == {limit}
        assert {len(sample["input_ids"]) for sample in first(qa1.train(limit), 20)} == {limit}

    def test_long_samples_are_made_when_read(self, qa1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            long = qa1.test(2_000_000, 1000)
            assert isinstance(long, IterableDataset) and isinstance(qa1.test(500, 2), Dataset)
            sample = next(iter(long))
        assert isinstance(sample["input_ids"], np.ndarray) and sample["input_ids"].dtype == np.int32
        assert sample["input_ids"].shape == sample["labels"].shape == (2_000_000,)

    def test_repeated_background_is_said_once(self, tokenizer, books, cache):
        task = Babilong("qa1", tokenizer, background=books, cache=cache)
        unique = task.unique_background_tokens("test")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            task.test(unique, 2)
            assert not caught
            task.test(unique + 1000, 2)
        assert len([w for w in caught if f"{unique:,} tokens" in str(w.message)]) == 1


class TestSamples:
    @pytest.mark.parametrize("name", ["demo", "stories260k"])
    @pytest.mark.parametrize("protocol", ["base", "instruct"])
    def test_text(self, name, protocol, books, cache, request):
        """Facts in their order, the question behind them, and the answer with the end-of-text token as labels."""
        path = DEMO if name == "demo" else request.getfixturevalue("shared") / "data" / name
        task = Babilong("qa2", path, background=books, cache=cache, protocol=protocol)
        for sample in [*task.test(4000, 3), *first(task.train(4000), 3)]:
            ids, labels, start = sample["input_ids"], sample["labels"], sample["prompt_length"]
            text = task.tokenizer.decode(ids[:start])
            position = 0
            for sentence in [*sample["facts"], sample["question"]]:
                position = text.index(sentence, position) + len(sentence)
            assert text.count("of book") > 20
            assert all(label == -100 for label in labels[:start])
            assert list(labels[start:]) == list(ids[start:])
            answer = task.tokenizer.decode(ids[start:])
            assert ids[-1] == task.tokenizer.eos_token_id
            assert task.score(answer, sample) == 1
            assert task.score("nowhere", sample) == 0

    @pytest.mark.filterwarnings("ignore:.*are left out")
    def test_distances(self, qa1, tokenizer, books, cache):
        qa3 = Babilong("qa3", tokenizer, background=books, cache=cache)
        for task in (qa1, qa3):
            stories = {story.name: story for story, _ in task.held_out["test"]}
            for sample in task.test(3000, 5):
                story = stories[sample["group"]]
                question = next(
                    q
                    for q in story.questions
                    if q.text == sample["question"] and story.facts[: q.position] == sample["facts"]
                )
                assert sample["distances"] == sorted(sample["distances"], reverse=True)
                prompt = sample["input_ids"][: sample["prompt_length"]]
                supports = sorted(question.supports)
                assert len(supports) == len(sample["distances"]) == int(task.task[2:])
                for support, distance in zip(supports, sample["distances"], strict=True):
                    ids = prompt[: len(prompt) - distance]
                    assert tokenizer.decode(ids).endswith(story.facts[support])

    def test_without_its_facts_a_text_is_as_long(self, qa1, tokenizer):
        for sample in qa1.test(1000, 5):
            prompt, ((start, end),) = sample["input_ids"][: sample["prompt_length"]], sample["fact_spans"]
            fact = tokenizer.decode(prompt[start:end]).strip()
            assert fact in sample["facts"]
            without = qa1.prompt_without_facts(sample).tolist()
            assert len(without) == len(prompt) and without[:start] + without[end:] == prompt[:start] + prompt[end:]
            assert tokenizer.decode(without).count(fact) == tokenizer.decode(prompt).count(fact) - 1

    def test_without_facts_and_background_a_text_is_shorter(self, tokenizer):
        task = Babilong("qa1", tokenizer)
        sample = task.test(0, 1)[0]
        (start, end), prompt = sample["fact_spans"][0], sample["input_ids"][: sample["prompt_length"]]
        assert task.prompt_without_facts(sample).tolist() == prompt[:start] + prompt[end:]

    def test_lengths_are_in_tokens_of_gpt2(self, qa1):
        assert qa1.tokens_of("4k") == qa1.tokens(4000) and qa1.tokens_of("0k") == 0

    def test_facts_lie_over_the_whole_length(self, qa1):
        shares = [
            sample["distances"][0] / sample["prompt_length"]
            for sample in qa1.test(2000, 300)
            if len(sample["facts"]) == 2
        ]
        assert len(shares) > 40 and min(shares) < 0.1 and max(shares) > 0.9
        # All facts: those of two-fact stories are order statistics of uniform places.
        firsts = []
        for story, _ in qa1.held_out["test"][:200]:
            rng = np.random.default_rng(len(firsts))
            sample = qa1.sample("test", Story("x", story.facts), Question("?", "office", (0,), 2), 2000, rng)
            firsts.append(1 - sample["distances"][0] / sample["prompt_length"])
        assert np.mean(firsts) == pytest.approx(1 / 3, abs=0.06)

    def test_deterministic(self, qa1, tokenizer, books, cache):
        again = Babilong("qa1", tokenizer, background=books, cache=cache)
        assert qa1.test(600, 4).to_list() == again.test(600, 4).to_list()
        assert qa1.validation(600, 4).to_list() == again.validation(600, 4).to_list()

        def ids(task, seed):
            return [list(sample["input_ids"]) for sample in first(task.train(600, seed), 4)]

        assert ids(qa1, 1) == ids(again, 1) != ids(qa1, 2)

    def test_copy_for_another_process_makes_the_same(self, qa1):
        pickled = pickle.dumps(qa1)
        assert len(pickled) < 300_000
        assert pickle.loads(pickled).test(600, 2).to_list() == qa1.test(600, 2).to_list()

    def test_training_starts_again_the_same(self, qa1):
        train = qa1.train(600)
        assert first(train, 1)[0]["input_ids"].tolist() == first(train, 1)[0]["input_ids"].tolist()

    @pytest.mark.parametrize(("task_name", "source"), [("qa1", "babi"), ("qa4", "babi"), ("qa1", "generated")])
    def test_sides_share_no_story_and_no_book(self, source, task_name, tokenizer, books, cache, request):
        data = request.getfixturevalue("babi") if source == "babi" else None
        task = Babilong(task_name, tokenizer, babi=data, background=books, cache=cache)
        train = itertools.islice(task.train_items(np.random.default_rng(0)), 3000)
        keys = {
            "train": {sample_key(*item) for item in train},
            **{side: {sample_key(*item) for item in items} for side, items in task.held_out.items()},
        }
        assert all(len(side) > 500 for side in keys.values())
        assert not any(keys[a] & keys[b] for a, b in itertools.combinations(keys, 2))
        samples = {
            "train": first(task.train(600), 20),
            "validation": task.validation(600, 20),
            "test": task.test(600, 20),
        }
        seen = {
            side: {
                int(book)
                for sample in of_side
                for book in re.findall(r"of book (\d+) the", tokenizer.decode(sample["input_ids"]))
            }
            for side, of_side in samples.items()
        }
        assert all(seen.values())
        assert not any(seen[a] & seen[b] for a, b in itertools.combinations(seen, 2))

    @pytest.mark.parametrize("name", [task for task in TASKS if task not in ("qa1", "qa2", "qa4")])
    def test_other_tasks(self, name, babi, tokenizer, books, cache):
        task = Babilong(name, tokenizer, babi=babi, background=books, cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for sample in (task.test(1500, 1)[0], task.validation(1500, 1)[0]):
                assert len(sample["input_ids"]) == 1500
                assert task.score(sample["answer"], sample) == 1

    def test_first_questions_are_of_many_stories(self, babi, tokenizer):
        task = Babilong("qa1", tokenizer, babi=babi)
        assert len(set(task.test(0, 100)["group"])) > 60
        assert len(task.test(0, 1500)) == 1500

    def test_baselines(self, babi, tokenizer):
        samples = Babilong("qa1", tokenizer, babi=babi).test(0, 1000)
        baselines = Babilong("qa1", tokenizer).baselines(list(samples))
        assert baselines == {
            "chance": pytest.approx(1 / 6),
            "majority": pytest.approx(0.2, abs=0.03),
            "last_location": pytest.approx(0.527, abs=0.0005),
        }
        with pytest.raises(ValueError, match="no samples"):
            Babilong("qa1", tokenizer).baselines([])


class TestInstruct:
    def test_prompt(self, tokenizer, books, cache):
        task = Babilong("qa1", tokenizer, background=books, cache=cache, protocol="instruct")
        sample = task.test(1500, 1)[0]
        text = tokenizer.decode(sample["input_ids"][: sample["prompt_length"]])
        assert text.count("Statements:") == text.count("Answer: ") == 3
        assert text.rstrip().endswith("Answer:") or tokenizer.chat_template
        assert task.score(f"It is the {sample['answer']}. Not elsewhere", sample) == 1

    def test_chat_template(self, books, cache):
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        tokenizer.chat_template = CHAT_TEMPLATE
        task = Babilong("qa1", tokenizer, background=books, cache=cache, protocol="instruct")
        sample = task.test(1500, 1)[0]
        text = tokenizer.decode(sample["input_ids"][: sample["prompt_length"]])
        assert "<|user|>Below is" in text and text.endswith("nothing else.<|assistant|>")
        assert len(sample["input_ids"]) == 1500

    def test_prompt_file(self, tokenizer, tmp_path):
        path = tmp_path / "prompt.txt"
        path.write_text("{json} Q: {question} E: {examples} C: {context} Q: {question}")
        task = Babilong("qa1", tokenizer, protocol="instruct", prompt_file=path)
        before, after = task.prompt_around_context("Who?")
        assert "{json} Q: Who? E: Statements:" in before
        assert after.startswith(" Q: Who?")
        for content, problem in (
            ("{context}", "lacks {question}"),
            ("{context}{context}{question}", "more than once"),
        ):
            path.write_text(content)
            with pytest.raises(ValueError, match=problem):
                Babilong("qa1", tokenizer, protocol="instruct", prompt_file=path)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"task": "qa0"}, "task is 'qa0'"),
            ({"task": "qa4"}, "Stories of qa4 cannot be generated"),
            ({"protocol": "chat"}, "protocol is 'chat'"),
            ({"background": "folder"}, "needs a cache folder"),
            ({"prompt_file": "x"}, "for the instruct protocol"),
        ],
    )
    def test_refused(self, tokenizer, options, problem):
        with pytest.raises(ValueError, match=problem):
            Babilong(**{"task": "qa1", "tokenizer": tokenizer, **options})

    def test_broken_babi_fails_at_once(self, tokenizer, tmp_path):
        with pytest.raises(BabiError, match="has no en-10k/qa1"):
            Babilong("qa1", tokenizer, babi=tmp_path)

    def test_tokenizer_without_end(self):
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no end-of-text token"):
            Babilong("qa1", tokenizer)
