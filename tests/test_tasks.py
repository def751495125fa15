"""Tasks: what is in their samples, on which side, in which shard, and what counts as right."""

import itertools
import json
import math
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.tasks import TASKS, load_task
from modeling_armt.conversion.tasks.documents import read_documents, side_of, side_of_book
from modeling_armt.conversion.tasks.options import parse_options
from modeling_armt.conversion.tasks.text import loss_by_position


MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
PLAIN = re.sub(r"{% (end)?generation %}", "", MARKED)


def fresh_tokenizer(template=None):
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return fresh_tokenizer()


def prose(seed: int, sentences: int) -> str:
    rng = np.random.default_rng(seed)
    words = ["garden", "letter", "morning", "water", "old", "house", "walked", "slowly", "never", "the", "a", "of"]
    made = (" ".join(rng.choice(words, size=rng.integers(4, 12))).capitalize() + "." for _ in range(sentences))
    return " ".join(f"Book {seed} says {i}: {sentence}" for i, sentence in enumerate(made))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of forty short books, on all sides."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(40):
        (folder / f"book{number}.txt").write_text(prose(number, 120))
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A file of two hundred conversations of two exchanges."""
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    with open(file, "w") as out:
        for n in range(200):
            turns = [("user", f"What is {n} and one?"), ("assistant", f"{n + 1}."), ("user", "Sure?")]
            turns.append(("assistant", f"Yes, {n + 1}, I am sure of it."))
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return file


@pytest.fixture(scope="module", params=["remember", "rewrite", "passkey", "needle", "text", "chat"])
def any_task(request, library, talks, tokenizer):
    """`(task, length)` of each kind."""
    return {
        "remember": lambda: (load_task("associative_retrieval", key_size=2, pairs=12), 70),
        "rewrite": lambda: (
            load_task("associative_retrieval", pairs=12, rewrite=True, segment_size=6, vary=False),
            90,
        ),
        "passkey": lambda: (load_task("passkey", tokenizer=tokenizer), 160),
        "needle": lambda: (load_task("needle", tokenizer=tokenizer, background=library), 160),
        "text": lambda: (load_task("text", tokenizer=tokenizer, source=library), 100),
        "chat": lambda: (load_task("chat", tokenizer=fresh_tokenizer(PLAIN), source=talks), 100),
    }[request.param]()


def take(samples, count):
    return list(itertools.islice(samples, count))


def ids_of(samples):
    return [tuple(sample["input_ids"]) for sample in samples]


def all_sides(task, length, count=15):
    return take(task.train(length), 100), list(task.validation(length, count)), list(task.test(length, count))


# Every task


def test_samples_keep_to_the_interface(any_task):
    task, length = any_task
    for samples in all_sides(task, length):
        for sample in samples:
            ids, labels = sample["input_ids"], sample["labels"]
            assert 0 < len(ids) == len(labels) <= length
            assert all(label in (-100, id) for label, id in zip(labels, ids, strict=True))
            assert "group" in sample
            if task.name != "text":
                assert labels[sample["prompt_length"] - 1] == -100
                assert labels[sample["prompt_length"] :] == ids[sample["prompt_length"] :] != []
            if task.exact:
                assert labels[: sample["prompt_length"]] == [-100] * sample["prompt_length"]
                assert all(0 <= distance < sample["prompt_length"] for distance in sample["distances"])
                assert len(sample["distances"]) == 1


def test_the_same_seed_gives_the_same_samples(any_task):
    task, length = any_task
    first = take(task.train(length, seed=3), 30)
    assert first == take(task.train(length, seed=3), 30)
    assert ids_of(first) != ids_of(take(task.train(length, seed=4), 30))
    assert list(task.test(length, 8)) == list(task.test(length, 8))
    assert list(task.test(length, 8)) == list(task.test(length, 15))[:8]
    assert len(list(task.validation(length, 8))) == 8


def test_sides_share_nothing(any_task):
    task, length = any_task
    train, validation, test = (set(ids_of(samples)) for samples in all_sides(task, length))
    assert len(validation) == len(test) == 15
    assert not train & validation and not train & test and not validation & test


def test_two_workers_of_two_processes_repeat_nothing(any_task):
    task, length = any_task
    seen, groups = [], []
    for rank in range(2):
        shard = split_dataset_by_node(task.train(length), rank=rank, world_size=2)
        samples = take(DataLoader(shard, batch_size=None, num_workers=2), 30)
        seen += ids_of(samples)
        groups += [sample["group"] for sample in samples]
    assert len(seen) == 120 / 2
    assert len(set(seen)) == len(seen)
    if task.name != "text":  # stretches of one book are one group
        assert len(set(groups)) == len(groups)


def test_data_sets_travel_to_spawned_workers(any_task):
    task, length = any_task
    for samples in (task.train(length), task.test(length, 5)):
        copied = pickle.loads(pickle.dumps(samples))
        assert ids_of(take(copied, 5)) == ids_of(take(samples, 5))


def test_a_stream_goes_on_where_it_was_saved(any_task):
    task, length = any_task
    stream = task.train(length)
    expected = ids_of(take(stream, 30))
    iterator = iter(stream)
    first = ids_of(take(iterator, 10))
    resumed = task.train(length)
    resumed.load_state_dict(stream.state_dict())
    assert first + ids_of(take(resumed, 20)) == expected


def test_groups_of_independent_samples_differ(any_task):
    task, length = any_task
    if task.name != "text":
        groups = [sample["group"] for sample in task.test(length, 15)]
        assert len(set(groups)) == 15


# Associative retrieval


def parse(task, ids):
    """The pairs, the question's key and its answer, read from the tokens."""
    k, v = task.key_size, task.value_size
    pairs, position = [], 0
    while ids[position + k] == task.sep_token_id:
        pairs.append((tuple(ids[position : position + k]), tuple(ids[position + k + 1 : position + k + 1 + v])))
        assert ids[position + k + 1 + v] == task.eos_token_id
        pad = ids[position + task.pair_size : position + task.segment_size]
        assert pad == [task.pad_token_id] * (task.segment_size - task.pair_size)
        position += task.segment_size
    question = ids[position:]
    assert len(question) == task.pair_size
    assert question[k] == task.gen_token_id and question[-1] == task.eos_token_id
    return pairs, tuple(question[:k]), tuple(question[k + 1 : -1])


@pytest.mark.parametrize("key_size, value_size, segment_size", [(1, 1, None), (2, 1, None), (3, 2, 10), (1, 3, 6)])
@pytest.mark.parametrize("rewrite", [False, True])
def test_the_answer_is_the_last_value_of_the_key(key_size, value_size, segment_size, rewrite):
    options = {"key_size": key_size, "value_size": value_size, "segment_size": segment_size, "rewrite": rewrite}
    task = load_task("associative_retrieval", pairs=9, **options)
    repeated = 0
    for sample in take(task.train(task.length(9)), 300):
        ids = sample["input_ids"]
        assert max(ids) < task.vocab_size
        pairs, key, value = parse(task, ids)
        places = [i for i, pair in enumerate(pairs) if pair[0] == key]
        assert pairs[places[-1]][1] == value
        assert sample["answer"] == " ".join(map(str, [*value, task.eos_token_id]))
        assert ids[sample["prompt_length"] :] == [*value, task.eos_token_id]
        end_of_pair = places[-1] * task.segment_size + task.pair_size
        assert sample["distances"] == [sample["prompt_length"] - end_of_pair]
        repeated += len({pair[0] for pair in pairs}) < len(pairs)
    assert (repeated > 0) == rewrite or key_size == 3


@pytest.mark.parametrize("rewrite", [False, True])
def test_without_its_pair_another_pair_stands_there(rewrite):
    task = load_task("associative_retrieval", key_size=2, rewrite=rewrite, segment_size=7)
    for sample in task.test(task.length(5), 50):
        (start, end), prompt = sample["fact_spans"][0], sample["input_ids"][: sample["prompt_length"]]
        key = prompt[-3:-1]
        assert prompt[start : start + 2] == key and end - start == task.pair_size
        without = task.prompt_without_facts(sample).tolist()
        assert len(without) == len(prompt) and without[:start] + without[end:] == prompt[:start] + prompt[end:]
        assert without[start : start + 2] != key and without[start:end] in [prompt[i : i + 5] for i in range(0, 35, 7)]
    sample = next(iter(task.test(task.length(1), 1)))
    assert task.prompt_without_facts(sample).tolist() == [task.pad_token_id] * 5 + sample["input_ids"][5:10]


def test_lengths_are_tokens_or_pairs(tokenizer):
    task = load_task("associative_retrieval", key_size=2)
    assert task.tokens_of("50p") == task.length(50) and task.tokens_of("1kp") == task.length(1000)
    assert task.tokens_of("4k") == load_task("passkey", tokenizer=tokenizer).tokens_of("4k") == 4000
    for bad in ("p", "4x", "fifty", "-3", ""):
        with pytest.raises(ValueError, match="is not a length; lengths look like"):
            task.tokens_of(bad)


def test_options_are_numbers_words_or_true_and_false():
    text = ["key_size=3", "share=0.5", "rewrite=true", "vary=False", "source=a=b.txt", "task=qa1"]
    assert parse_options(text) == {
        "key_size": 3, "share": 0.5, "rewrite": True, "vary": False, "source": "a=b.txt", "task": "qa1"
    }  # fmt: skip
    for bad, message in (
        (["key_size"], "not NAME=VALUE"),
        (["=3"], "not NAME=VALUE"),
        (["a=1", "a=2"], "given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_options(bad)


def test_pairs_fill_the_length_and_vary_only_in_training():
    task = load_task("associative_retrieval")
    assert task.pairs_in(4 * 6) == task.pairs_in(4 * 6 + 3) == 5
    assert {len(ids) for ids in ids_of(task.test(24, 50))} == {24}
    counts = [len(ids) // 4 - 1 for ids in ids_of(take(task.train(24), 2000))]
    assert all(abs(counts.count(n) / 2000 - 1 / 5) < 0.05 for n in (1, 2, 3, 4, 5))
    fixed = load_task("associative_retrieval", vary=False)
    assert {len(ids) for ids in ids_of(take(fixed.train(24), 50))} == {24}


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_training_sample_may_have_more_questions(rewrite):
    """Each is for a pair of the sample, for all of them before one comes again."""
    task = load_task("associative_retrieval", questions=5, segment_size=6, rewrite=rewrite, vary=False)
    for sample in take(task.train(task.length(3)), 200):
        ids, labels = (np.array(sample[name] + 2 * [task.pad_token_id]) for name in ("input_ids", "labels"))
        pairs, questions = ids.reshape(-1, 6)[:3], ids.reshape(-1, 6)[3:]
        newest = dict(pairs[:, [0, 2]].tolist())
        assert [newest[key] for key in questions[:, 0].tolist()] == questions[:, 2].tolist()
        assert rewrite or set(questions[:3, 0]) == set(newest)
        assert (questions[:, 1] == task.gen_token_id).all() and len(questions) == 5
        assert (labels[:18] == -100).all() and (labels[-4:-2] == ids[-4:-2]).all()
    assert {len(ids) for ids in ids_of(task.test(task.length(3), 9))} == {task.length(3)}


def test_no_question_of_a_test_sample_has_a_loss_in_training():
    task = load_task("associative_retrieval", questions=2, vary=False)
    tested, told = set(ids_of(task.test(task.length(2), 6000))), []
    for sample in take(task.train(task.length(2)), 6000):
        ids, labels = sample["input_ids"], sample["labels"]
        for start in (8, 12):
            has_loss = labels[start + 2 : start + 4] == ids[start + 2 : start + 4]
            assert has_loss or labels[start : start + 4] == [-100] * 4
            told.append((has_loss, tuple(ids[:8] + ids[start : start + 4]) in tested))
    assert (True, True) not in told and (False, True) in told
    assert 0.8 < sum(has_loss for has_loss, _ in told) / len(told) < 0.95  # 7 of 10 questions that are not the last


@pytest.mark.parametrize("rewrite", [False, True])
def test_keys_of_a_sample_may_have_few_symbols(rewrite):
    task = load_task("associative_retrieval", key_size=3, key_symbols=2, rewrite=rewrite)
    used = set()
    for sample in take(task.train(task.length(8)), 500) + list(task.test(task.length(8), 500)):
        pairs = np.array(sample["input_ids"][: -task.pair_size]).reshape(-1, task.pair_size)
        keys = list(map(tuple, pairs[:, :3]))
        symbols = frozenset(pairs[:, :3].ravel().tolist())
        assert len(symbols) <= 2 and (rewrite or len(set(keys)) == len(keys))
        used |= {symbols} if len(symbols) == 2 else set()
    assert len(used) > 100  # of 120


def test_few_symbols_must_make_enough_keys():
    with pytest.raises(ValueError, match="there are only 8 of key_size 3 and 2 symbols"):
        load_task("associative_retrieval", key_size=3, key_symbols=2, pairs=9)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f"key_symbols is {wrong}; it must be from 1 to 16"):
            load_task("associative_retrieval", key_symbols=wrong)


def test_short_samples_have_one_side_whatever_the_longest_is():
    task = load_task("associative_retrieval")
    trained = set(ids_of(take(task.train(4 * 6), 3000)))
    assert trained & set(ids_of(take(task.train(4 * 2), 1000)))  # samples of one pair come again
    assert not trained & set(ids_of(task.test(4 * 2, 1000)))


@pytest.mark.parametrize("rewrite", [False, True])
def test_retrieval_baselines_are_what_probability_says(rewrite):
    pairs = 8
    task = load_task("associative_retrieval", pairs=pairs, rewrite=rewrite)
    samples = list(task.test(task.length(pairs), 4000))
    asks_last = 1 / pairs + (1 - 1 / pairs) / 16 * rewrite
    expected = asks_last + (1 - asks_last) / 16
    found = task.baselines(samples)
    assert found["chance"] == 1 / 16
    assert abs(found["last value seen"] - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    by_hand = sum(
        parse(task, sample["input_ids"])[0][-1][1] == parse(task, sample["input_ids"])[2] for sample in samples
    )
    assert found["last value seen"] == by_hand / 4000


def test_retrieval_is_exact_on_value_and_eos():
    task = load_task("associative_retrieval", value_size=2)
    sample = {"answer": "3 14 102"}
    assert task.score("3 14 102", sample) == task.score(" 3 14 102 5 5", sample) == 1
    assert task.score("3 14", sample) == task.score("3 1 102", sample) == task.score("", sample) == 0
    assert task.score("3 14 100", sample) == 0


def test_retrieval_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="17 pairs need as many different keys.*only 16"):
        load_task("associative_retrieval", pairs=17)
    with pytest.raises(ValueError, match="10 pairs need a length of 44 tokens, not 43"):
        load_task("associative_retrieval", pairs=10).train(43)
    with pytest.raises(ValueError, match="1 pairs need a length of 8"):
        load_task("associative_retrieval").test(7, 1)
    with pytest.raises(ValueError, match="segment_size is 3"):
        load_task("associative_retrieval", segment_size=3)
    with pytest.raises(ValueError, match="at least 1"):
        load_task("associative_retrieval", key_size=0)


# Passkey and needle


@pytest.fixture(scope="module", params=["passkey", "needle"])
def hidden(request, library, tokenizer):
    options = {"background": library} if request.param == "needle" else {}
    return load_task(request.param, tokenizer=tokenizer, **options)


def test_the_fact_is_where_depth_and_distance_say(hidden, tokenizer):
    length = 600
    samples = list(hidden.test(length, 22))
    assert [sample["depth"] for sample in samples] == [i / 10 for i in range(11)] * 2
    for sample in samples:
        ids, end = sample["input_ids"], sample["prompt_length"] - sample["distances"][0]
        assert length - 60 < len(ids) <= length
        assert tokenizer.decode(ids[:end]).endswith((f"{sample['answer']}.", f"{sample['answer']} lanterns."))
        assert tokenizer.decode(ids[sample["prompt_length"] :]) == f" {sample['answer']}{tokenizer.eos_token}"
        question = tokenizer.decode(ids[: sample["prompt_length"]])
        assert question.endswith(("The pass key is", "It has exactly"))
        assert tokenizer.decode(ids).count(sample["answer"]) == 2
    for grid in (samples[:11], samples[11:]):
        ends = [(s["prompt_length"] - s["distances"][0]) / s["prompt_length"] for s in grid]
        assert ends == sorted(ends)
        assert all(abs((end - ends[0]) / (ends[-1] - ends[0]) - i / 10) < 0.05 for i, end in enumerate(ends))


def test_without_its_fact_a_text_is_as_long_and_tells_no_number(hidden, tokenizer):
    for sample in hidden.test(400, 11):
        (start, end), prompt = sample["fact_spans"][0], sample["input_ids"][: sample["prompt_length"]]
        assert sample["answer"] in tokenizer.decode(prompt[start:end])
        without = hidden.prompt_without_facts(sample).tolist()
        assert len(without) == len(prompt) and without[:start] + without[end:] == prompt[:start] + prompt[end:]
        assert sample["answer"] in tokenizer.decode(prompt) and sample["answer"] not in tokenizer.decode(without)
        assert without == hidden.prompt_without_facts(sample).tolist()


def test_training_has_all_depths(hidden):
    depths = [sample["depth"] for sample in take(hidden.train(300), 200)]
    assert min(depths) < 0.05 and max(depths) > 0.95 and len(set(depths)) == 200


def test_numbers_belong_to_one_side(hidden):
    for side, samples in zip(("train", "validation", "test"), all_sides(hidden, 200, 40), strict=True):
        assert {side_of(sample["answer"]) for sample in samples} == {side}


def test_cities_and_books_of_needles_belong_to_one_side(library, tokenizer):
    task = load_task("needle", tokenizer=tokenizer, background=library)
    found = []
    for samples in all_sides(task, 300, 40):
        texts = [tokenizer.decode(sample["input_ids"]) for sample in samples]
        found.append({word for text in texts for word in re.findall(r"Book \d+|city of \w+", text)})
    assert all(len(one) > 4 and not one & other for one, other in itertools.combinations(found, 2))


def test_background_comes_again_where_it_is_short(tokenizer):
    task = load_task("needle", tokenizer=tokenizer, background=[prose(1, 60)])
    assert 4900 < len(next(iter(task.test(5000, 1)))["input_ids"]) <= 5000
    task = load_task("needle", tokenizer=tokenizer, background=["word " * 5000])  # one endless sentence
    assert 850 < len(next(iter(task.test(1000, 1)))["input_ids"]) <= 1000


def test_numbers_are_scored_by_the_first_one(hidden):
    sample = next(iter(hidden.test(200, 1)))
    number = sample["answer"]
    assert hidden.score(f" {number}", sample) == hidden.score(f" {number}. And 7", sample) == 1
    for wrong in ("", "none", number[:-1], number + "0", f"7 {number}"):
        assert hidden.score(wrong, sample) == 0
    assert hidden.baselines([sample]) == {"chance": 1 / (9 * 10 ** (len(number) - 1))}


def test_a_length_shorter_than_its_fact_is_refused(hidden):
    for side in (hidden.train, lambda length: hidden.validation(length, 1), lambda length: hidden.test(length, 1)):
        with pytest.raises(ValueError, match=rf"A {hidden.name} sample without any filler has \d+ tokens"):
            side(20)


# Text


def test_stretches_are_of_one_document_and_cover_it(library, tokenizer):
    task = load_task("text", tokenizer=tokenizer, source=library)
    texts = {file.name: file.read_text() for file in library.iterdir()}
    mine = [name for name in texts if side_of_book(name.removesuffix(".txt")) == "train"]
    covered = {name: np.zeros(len(texts[name]), dtype=bool) for name in mine}
    stretches = task._stretches("train", 200).count
    for sample in take(task.train(200), stretches):
        text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
        start = texts[sample["group"]].index(text)
        covered[sample["group"]][start : start + len(text)] = True
    assert np.mean(np.concatenate(list(covered.values()))) > 0.8
    assert all(one.any() for one in covered.values())
    assert task.exact is False and task.baselines([]) == {}


def test_passes_differ_and_short_documents_stay_whole(tokenizer):
    texts = [f"The story of number {i} is short." for i in range(100)]
    task = load_task("text", tokenizer=tokenizer, source=texts)
    count = task._stretches("train", 64).count
    samples = take(task.train(64), 2 * count)
    first, second = ids_of(samples[:count]), ids_of(samples[count:])
    assert first != second and set(first) == set(second) and len(set(first)) == count
    for sample in samples[:count]:
        assert tokenizer.decode(sample["input_ids"]) == texts[int(sample["group"].split()[1])] + tokenizer.eos_token


def test_evaluation_stretches_have_the_length_or_are_refused(library, tokenizer):
    task = load_task("text", tokenizer=tokenizer, source=library)
    assert {len(ids) for ids in ids_of(task.test(150, 10))} == {150}
    with pytest.raises(ValueError, match="The test texts have 0 stretches of 100000 tokens, not 1"):
        list(task.test(100_000, 1))


def test_loss_starts_where_it_is_told_to(library, tokenizer):
    task = load_task("text", tokenizer=tokenizer, source=library, loss_from=32)
    for sample in take(task.train(100), 20):
        assert sample["labels"] == [-100] * 32 + sample["input_ids"][32:]
    with pytest.raises(ValueError, match="no loss, which starts at token 32"):
        task.train(32)
    with pytest.raises(ValueError, match="No text for training is longer than 32 tokens"):
        load_task("text", tokenizer=tokenizer, source=["Short."] * 100, loss_from=32).train(64)


def test_few_documents_are_cut_into_sides(tokenizer):
    words = " ".join(f"w{i}" for i in range(1000))
    documents = read_documents([words])
    parts = [documents.side(side).texts[0] for side in ("train", "validation", "test")]
    assert "".join(parts) == words
    assert [round(len(part) / len(words), 2) for part in parts] == [0.8, 0.1, 0.1]
    with pytest.raises(ValueError, match="not enough text"):
        read_documents(["word"]).side("test")


def test_loss_is_told_by_position_and_by_segment():
    nan = float("nan")
    losses = [[nan, 2.0, 4.0, 6.0], [nan, 4.0, 2.0], [nan, nan, nan, nan, 1.0]]
    mean, count = loss_by_position(losses)
    assert count.tolist() == [0, 2, 2, 1, 1]
    np.testing.assert_array_equal(mean, [nan, 3, 3, 6, 1])
    mean, count = loss_by_position(losses, size=2)
    assert count.tolist() == [2, 3, 1] and mean.tolist() == [3, 4, 1]


def test_archives_read_as_their_folder_does(library, tmp_path):
    expected = read_documents(library)
    for name, mode in (("a.tar", "w"), ("a.tar.xz", "w:xz"), ("a.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(library, arcname=".")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in library.iterdir():
            archive.write(file, file.name)
    for file in tmp_path.iterdir():
        found = read_documents(file)
        assert [name.removeprefix("./") for name in found.names] == expected.names
        assert found.texts == expected.texts
        for side in ("train", "validation", "test"):
            assert list(found.side(side).texts) == list(expected.side(side).texts)


@pytest.mark.parametrize("name, mode", [("a.tar", "w"), ("a.tar.xz", "w:xz"), ("a.tar.gz", "w:gz"), ("a.zip", None)])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7])
def test_damaged_archives_are_named(library, tmp_path, name, mode, kept):
    path = tmp_path / name
    if mode:
        with tarfile.open(path, mode) as archive:
            archive.add(library, arcname="books")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in library.iterdir():
                archive.write(file, file.name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged or incomplete"):
        read_documents(path)


def test_archives_cut_between_files_are_named(library, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(library, arcname="books")
    with tarfile.open(path) as archive:
        boundary = archive.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:boundary])
    with pytest.raises(ValueError, match="a.tar is damaged or incomplete.*its end is missing"):
        read_documents(path)


def test_bad_sources_are_named(tmp_path):
    for missing in ("nothing/here.tar.xz", "novels.zip", "novels", "tests/novels", str(tmp_path / "no")):
        with pytest.raises(FileNotFoundError, match=re.escape(missing)):
            read_documents(missing)
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither a file or folder here nor"):
        read_documents("nobody/nothing")
    with pytest.raises(ValueError, match="no .*txt files in"):
        read_documents(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt is empty.*unpack that again"):
        read_documents(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="empty.txt is not a UTF-8 text"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="list of texts is empty"):
        read_documents([])


def test_novels_read_from_the_archive(shared):
    documents = read_documents(shared / "data" / "novels.tar.xz")
    assert len(documents) == 176 and documents.lengths.min() > 10_000
    sides = [documents.side(side) for side in ("train", "validation", "test")]
    assert sum(map(len, sides)) == 176 and min(map(len, sides)) > 5


# Chat


def answers_in(sample, tokenizer):
    """The texts of the labelled stretches."""
    edges = np.flatnonzero(np.diff([0, *(label != -100 for label in sample["labels"]), 0])).reshape(-1, 2)
    return [tokenizer.decode(sample["input_ids"][a:b]) for a, b in edges]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_the_loss_is_on_answers_only(talks, template):
    tokenizer = fresh_tokenizer(template)
    task = load_task("chat", tokenizer=tokenizer, source=talks)
    for sample in take(task.train(200), 50):
        n = sample["group"]
        text = tokenizer.decode(sample["input_ids"])
        eos = tokenizer.eos_token
        expected = [f"{n + 1}.{eos}", f"Yes, {n + 1}, I am sure of it.{eos}"]
        assert text == (
            f"{tokenizer.bos_token}[user] What is {n} and one?\n[assistant] {expected[0]}\n"
            f"[user] Sure?\n[assistant] {expected[1]}"
        )
        assert [answer.lstrip() for answer in answers_in(sample, tokenizer)] == expected
        assert sample["answer"] == f"Yes, {n + 1}, I am sure of it."
        assert tokenizer.decode(sample["input_ids"][: sample["prompt_length"]]).rstrip().endswith("[assistant]")


def test_both_ways_to_find_answers_agree(talks):
    marked, plain = (load_task("chat", tokenizer=fresh_tokenizer(t), source=talks) for t in (MARKED, PLAIN))
    assert list(marked.test(200, 10)) == list(plain.test(200, 10))


def test_conversations_are_cut_behind_an_answer(talks):
    tokenizer = fresh_tokenizer(MARKED)
    task = load_task("chat", tokenizer=tokenizer, source=talks)
    whole = take(task.train(200), 50)
    longest = min(len(sample["input_ids"]) for sample in whole) - 1
    for sample in take(task.train(longest), 50):
        assert len(answers_in(sample, tokenizer)) == 1
        assert sample["answer"] == f"{sample['group'] + 1}."
        assert sample["input_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="No conversation of .* has an answer within 5 tokens"):
        task.train(5)
    with pytest.raises(ValueError, match=r"has \d+ conversations for test .* not 150"):
        list(task.test(200, 150))


def test_a_pass_has_every_conversation_once(talks):
    task = load_task("chat", tokenizer=fresh_tokenizer(PLAIN), source=talks)
    numbers = task._sides["train"]
    groups = [sample["group"] for sample in take(task.train(200), 2 * len(numbers))]
    first, second = groups[: len(numbers)], groups[len(numbers) :]
    assert sorted(first) == sorted(second) == numbers and first != second


def test_one_question_is_on_one_side(tmp_path):
    file = tmp_path / "talks.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Q{n % 50}"}, {"role": "assistant", "content": f"A{n}"}]}
        for n in range(200)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    sides = load_task("chat", tokenizer=fresh_tokenizer(PLAIN), source=file)._sides
    asked = [{n % 50 for n in numbers} for numbers in sides.values()]
    assert sum(map(len, asked)) == 50


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"messages": [', "is not JSON"),
        ("[]", 'not an object with "messages"'),
        ('{"messages": []}', 'not an object with "messages"'),
        ('{"messages": [{"role": "user"}]}', 'without "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "Hello"}]}', "no message of the role assistant"),
        ('{"messages": [{"role": "assistant", "content": "Hello"}]}', "begins with an answer"),
    ],
)
def test_a_broken_line_is_named(talks, tmp_path, line, problem):
    lines = talks.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:3], "", line, *lines[3:]]))
    with pytest.raises(ValueError, match=rf"broken.jsonl, line 5.*{problem}"):
        load_task("chat", tokenizer=fresh_tokenizer(PLAIN), source=broken)


def test_tokenizers_that_cannot_chat_are_refused(talks, tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        load_task("chat", tokenizer=fresh_tokenizer(), source=talks)
    with pytest.raises(ValueError, match=r"the tokenizer lacks: <\|im_start\|>"):
        load_task("chat", tokenizer=fresh_tokenizer("<|im_start|>" + PLAIN), source=talks)
    without_eos = fresh_tokenizer(PLAIN)
    without_eos.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer lacks: eos_token"):
        load_task("chat", tokenizer=without_eos, source=talks)
    forgetful = PLAIN.replace("in messages", "in messages[-2:]")
    with pytest.raises(ValueError, match=r"talks.jsonl, line \d+: the chat template does not leave earlier messages"):
        load_task("chat", tokenizer=fresh_tokenizer(forgetful), source=talks).train(200)
    refusing = PLAIN + "{{ raise_exception('no small talk') }}"
    with pytest.raises(ValueError, match=r"refuses .*talks.jsonl, line \d+: no small talk"):
        load_task("chat", tokenizer=fresh_tokenizer(refusing), source=talks).train(200)
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        load_task("chat", tokenizer=fresh_tokenizer(PLAIN), source=tmp_path / "missing.jsonl")


# By name


def test_unknown_names_and_options_are_told_what_there_is():
    with pytest.raises(ValueError, match="no task 'recall'.*associative_retrieval, babilong, chat, needle"):
        load_task("recall")
    with pytest.raises(ValueError, match="'associative_retrieval' has no option keys; its options are: key_size, val"):
        load_task("associative_retrieval", keys=2)
    with pytest.raises(ValueError, match="'passkey' needs tokenizer; its options are: tokenizer, digits"):
        load_task("passkey")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "babilong"])
def test_names_are_those_of_the_tasks(name):
    module, class_name = TASKS[name].split(":")
    task = __import__(f"modeling_armt.conversion.tasks.{module}", fromlist=[class_name])
    assert getattr(task, class_name).name == name
