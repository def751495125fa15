"""The real thing: stories260k, converted, reads a novel in constant memory, and remembers it in another process."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt.conversion.convert import convert


SEGMENT_SIZE = 128
QUESTIONS = ["Once upon a time", "The old man said", "Lily went to the park and"]

# Reads a short and a long text, each in one call, and takes down after each the most that the process ever held. (Not
# ru_maxrss: on Linux a process starts with that of the one that started it.)
READER = """
import json, re, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import modeling_armt

folder, file = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = load_file(file)["ids"]

@torch.no_grad()
def peak(reader, length):
    reader(ids[:, :length], logits_to_keep=1)
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

found = {"short": peak(model, 10_000), "long": peak(model, 100_000), "backbone": peak(model.model, 8_000)}
print(json.dumps(found))
"""

# Asks a saved memory.
ANSWERER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import modeling_armt

folder, file = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder)
memory = model.load_memory(file)
answers = []
for question in json.load(sys.stdin):
    ids = torch.tensor([question])
    output = model.generate(ids, cache=memory.fork(), max_new_tokens=60, min_new_tokens=60, do_sample=False)
    answers.append(output[0, len(question):].tolist())
print(json.dumps(answers))
"""


def run_python(script: str, *arguments: str | Path, **options) -> list | dict:
    """The JSON that a script prints last, run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        **options,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory) -> Path:
    """stories260k with memories that matter, as they do after training."""
    folder = tmp_path_factory.mktemp("stories") / "armt"
    model = convert(shared / "data" / "stories260k", folder, SEGMENT_SIZE, num_mem_tokens=8, d_mem=32)
    torch.manual_seed(0)
    for memory in model.memory.values():
        nn.init.normal_(memory.memory_value.weight, std=0.03)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ARMTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def novel(shared: Path, folder: Path) -> torch.Tensor:
    """`(1, 100000)`, the beginning of a real novel."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tarfile.open(shared / "data" / "novels.tar.xz", mode="r|xz") as archive:
        for member in archive:
            if member.isfile() and member.size > 500_000:
                text = archive.extractfile(member).read(500_000).decode("utf-8", errors="ignore")
                break
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :100_000]


def test_the_novel_is_long_enough(novel):
    assert novel.shape == (1, 100_000)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
class TestConstantMemory:
    @pytest.fixture(scope="class")
    @classmethod
    def peaks(cls, folder: Path, novel: torch.Tensor, tmp_path_factory) -> dict[str, int]:
        file = tmp_path_factory.mktemp("novel") / "ids.safetensors"
        save_file({"ids": novel}, file)
        return run_python(READER, folder, file)

    def test_a_text_ten_times_as_long_takes_no_more(self, peaks):
        """2% of the process are about 8 MB: keys of 100,000 tokens would be 128 MB, their last hidden states 26 MB."""
        assert peaks["long"] < 1.02 * peaks["short"]

    def test_the_measure_sees_what_a_plain_model_keeps(self, peaks):
        """Which reads no more than 8,000 tokens here."""
        assert peaks["backbone"] > 1.04 * peaks["long"]

    @torch.no_grad()
    def test_a_saved_memory_does_not_grow_with_the_text(self, model, novel, tmp_path):
        sizes = []
        for segments in (2, 40):
            cache = model(novel[:, : segments * SEGMENT_SIZE + 17], logits_to_keep=1).cache
            model.save_memory(cache, tmp_path / "memory")
            sizes.append((tmp_path / "memory").stat().st_size)
        assert abs(sizes[1] - sizes[0]) < 100  # numbers in the header have more digits


class TestSavedMemory:
    """The memory of a text, in the middle of a segment, asked here and in another process."""

    @pytest.fixture(scope="class")
    @classmethod
    def cache(cls, model: ARMTForCausalLM, novel: torch.Tensor) -> ARMTCache:
        with torch.no_grad():
            cache = model(novel[:, :10_037], logits_to_keep=1).cache
        assert cache.opened == [10_037 % SEGMENT_SIZE]
        return cache

    @pytest.fixture(scope="class")
    @classmethod
    def questions(cls, folder: Path) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer(question, add_special_tokens=False)["input_ids"] for question in QUESTIONS]

    @staticmethod
    def ask(model: ARMTForCausalLM, questions: list[list[int]], cache: ARMTCache) -> list[list[int]]:
        options = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
        outputs = [model.generate(torch.tensor([q]), cache=cache.fork(), **options)[0] for q in questions]
        return [output[len(q) :].tolist() for q, output in zip(questions, outputs, strict=True)]

    @pytest.fixture(scope="class")
    @classmethod
    def answers(cls, model, questions, cache) -> list[list[int]]:
        """What the live memory answers."""
        return cls.ask(model, questions, cache)

    def test_answers_in_another_process_exactly_like_the_live_one(
        self, model, folder, questions, cache, answers, tmp_path
    ):
        model.save_memory(cache, tmp_path / "memory")
        found = run_python(ANSWERER, folder, tmp_path / "memory", input=json.dumps(questions))
        assert found == answers

    def test_answers_here_exactly_like_the_live_one(self, model, questions, cache, answers, tmp_path):
        model.save_memory(cache, tmp_path / "memory")
        assert self.ask(model, questions, model.load_memory(tmp_path / "memory")) == answers

    def test_answers_again_what_it_answered_before(self, model, questions, cache, answers):
        assert self.ask(model, questions, cache) == answers

    def test_answers_depend_on_what_was_read(self, model, questions, novel, answers):
        with torch.no_grad():
            other = model(novel[:, 20_000:30_037], logits_to_keep=1).cache
        for answer, unlike in zip(answers, self.ask(model, questions, other), strict=True):
            assert answer != unlike
