"""The `armt` command: what it does, what it says, and how it fails."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_backbone
from helpers import users_environment
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from modeling_armt import ARMTConfig, ARMTForCausalLM
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE


PROMPT = "The old house stood at the end of the road. " * 5
QUESTION = " In the evening the old man"
REPORT = re.compile(
    r"^(?P<read>[\d,]+) tokens read \([\d,]+/s\)(?:, (?P<new>[\d,]+) generated \([\d,.]+/s\))?, "
    r"peak memory (?P<peak>[\d,]+) MiB$"
)


def armt(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "modeling_armt.conversion", *map(str, arguments)]
    environment = users_environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


class Outcome:
    """What a command that ran in this process printed and returned."""

    def __init__(self, capsys, *arguments: str | Path):
        self.code = main([str(argument) for argument in arguments])
        self.out, self.err = capsys.readouterr()
        # A progress bar returns to the start of its line when it is done, and to that of one above it, if any.
        self.last_line = self.err.rstrip("\n").replace("\r", "\n").rpartition("\n")[2].strip().removeprefix("\x1b[A")

    def report(self) -> dict[str, int | None]:
        """The numbers of the closing line."""
        match = REPORT.match(self.last_line)
        assert match, self.err
        return {name: value and int(value.replace(",", "")) for name, value in match.groupdict().items()}


@pytest.fixture
def run(capsys):
    """Runs a command in this process."""
    return lambda *arguments: Outcome(capsys, *arguments)


@pytest.fixture
def fails(capsys):
    """Runs a command that has to fail, and returns the one line it says."""

    def fails(*arguments: str | Path) -> str:
        outcome = Outcome(capsys, *arguments)
        assert outcome.code == 1
        assert outcome.out == ""
        assert outcome.last_line.startswith("armt: "), outcome.err
        assert outcome.err.count("armt: ") == 1
        return outcome.last_line

    return fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demonstration's backbone with memories that matter; it writes what it finds most likely."""
    folder = tmp_path_factory.mktemp("cli") / "armt"
    model = convert(BACKBONE, folder, segment_size=32, num_mem_tokens=4, d_mem=16, dtype="float32")
    torch.manual_seed(0)
    for memory in model.memory.values():
        nn.init.normal_(memory.memory_value.weight, std=0.05)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


def expected_text(folder: Path, *texts: str) -> str:
    """What `generate` adds in 20 tokens, after texts that were tokenized one by one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=not number)["input_ids"] for number, text in enumerate(texts)]
    ids = torch.tensor([sum(ids, [])])
    output = model.generate(ids, max_new_tokens=20)[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def count_tokens(folder: Path, text: str) -> int:
    return len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


class TestHelp:
    @pytest.mark.parametrize(
        ("verb", "options"),
        [
            ("convert", ["--segment-size", "--num-mem-tokens", "--d-mem", "--variant", "--memory-layers", "--dtype"]),
            ("convert", ["--no-correction", "--dry-run"]),
            ("import", ["--backbone", "--segment-size", "--variant", "--no-correction", "--no-denom", "--out"]),
            (
                "generate",
                ["--prompt", "--prompt-file", "--prompt-ids", "--max-new-tokens", "--save-memory", "--load-memory"],
            ),
            ("demo", ["--out"]),
        ],
    )
    def test_of_a_verb_names_its_options(self, capsys, verb, options):
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        printed = capsys.readouterr().out
        assert all(option in printed for option in options)

    def test_names_every_verb(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        printed = capsys.readouterr().out
        assert all(re.search(rf"^ +{verb} ", printed, re.M) for verb in ("convert", "import", "generate", "demo"))

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["fly"],
            ["convert", "backbone"],
            ["convert", "backbone", "--out", "x", "--variant", "v3"],
            ["convert", "backbone", "--out", "x", "--segment-size", "many"],
            ["import", "checkpoint", "--backbone", "b", "--out", "x", "--segment-size", "8"],
            ["generate", "model"],
            ["generate", "model", "--prompt", "a", "--prompt-file", "b"],
            ["generate", "model", "--prompt-file", "a", "--prompt-ids", "b"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_told_with_the_usage(self, capsys, arguments):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.startswith("usage: armt")


class TestConvert:
    def test_options_arrive(self, run, tmp_path):
        options = ["--segment-size", 24, "--num-mem-tokens", 3, "--d-mem", 5, "--variant", "paper"]
        outcome = run("convert", BACKBONE, "--out", tmp_path / "armt", *options, "--memory-layers", 1, 4)
        assert outcome.code == 0
        config = ARMTConfig.from_pretrained(tmp_path / "armt")
        assert (config.segment_size, config.num_mem_tokens, config.d_mem) == (24, 3, 5)
        assert (config.normalize_features, config.memory_layers) == (False, [1, 4])

    @pytest.mark.parametrize("out", [[], ["--out", "armt"]])
    def test_dry_run_writes_nothing_and_says_whether_it_fits(self, run, tmp_path, monkeypatch, out):
        monkeypatch.chdir(tmp_path)
        outcome = run("convert", "--dry-run", BACKBONE, *out, "--segment-size", 24, "--seed", 1)
        assert outcome.code == 0
        assert "1.9 million parameters in bfloat16" in outcome.out
        assert "segment of 24 tokens" in outcome.out and outcome.out.rstrip().endswith("it fits")
        assert list(tmp_path.iterdir()) == []

    def test_dtype_arrives(self, run, tmp_path):
        run("convert", BACKBONE, "--out", tmp_path / "armt", "--dtype", "float16")
        weights = load_file(tmp_path / "armt" / "model.safetensors")
        assert weights["model.model.embed_tokens.weight"].dtype == torch.float16

    def test_says_what_came_out(self, run, tmp_path):
        outcome = run("convert", BACKBONE, "--out", tmp_path / "armt", "--segment-size", 24)
        assert "segments of 24 tokens" in " ".join(outcome.err.split())

    def test_full_out(self, fails, tmp_path):
        (tmp_path / "mine").write_text("mine")
        assert "not empty" in fails("convert", BACKBONE, "--out", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_missing_backbone(self, fails, tmp_path):
        assert "no/such" in fails("convert", "no/such", "--out", tmp_path / "armt")

    @pytest.mark.parametrize("name", ["mistyped", "mistyped/folder"])
    @pytest.mark.parametrize("verb", [
        "convert {} --out out", "import weights.bin --backbone {} --out out --segment-size 8 --variant v2",
        "train {} --task passkey --out out", "evaluate {} --task passkey --lengths 1k --out out",
        "generate {} --prompt-ids ids.npy", "inspect {} --text text", "serve {} --port 0", "merge {} --out out",
        "card {}", "publish {} ann/name",
    ], ids=lambda verb: verb.split()[0])  # fmt: skip
    def test_mistyped_folder_answers_at_once(self, fails, tmp_path, monkeypatch, verb, name):
        """The Hub may have a model of that name: it is asked once, where it is not out of reach."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        Path("text").write_text("once")
        np.save("ids.npy", [3])
        asked, find = [], socket.getaddrinfo

        def unknown_host(host, *arguments, **options):
            if host == "localhost":
                return find(host, *arguments, **options)
            asked.append(host)
            raise socket.gaierror("no such host")

        monkeypatch.setattr("socket.getaddrinfo", unknown_host)
        assert name in fails(*verb.format(name).split())
        assert len(asked) <= 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "text"]

    def test_family_that_cannot(self, fails, tmp_path):
        CONFIG_MAPPING["t5"]().save_pretrained(tmp_path / "t5")
        assert "t5 model" in fails("convert", tmp_path / "t5", "--out", tmp_path / "armt")

    @pytest.mark.parametrize("option", ["--segment-size", "--num-mem-tokens", "--d-mem"])
    def test_size_below_one(self, fails, tmp_path, option):
        line = fails("convert", BACKBONE, "--out", tmp_path / "armt", option, "0")
        assert f"{option[2:].replace('-', '_')} is 0" in line

    def test_armt_checkpoint(self, fails, folder, tmp_path):
        assert "already" in fails("convert", folder, "--out", tmp_path / "armt")

    def test_full_disk_is_one_line(self, fails, tmp_path):
        with full_disk(100_000):
            assert "too large" in fails("convert", BACKBONE, "--out", tmp_path / "armt")
        assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, so that writing fails in the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestImport:
    pytest.importorskip("modeling_armt.conversion.importing")

    @pytest.fixture
    def trained(self) -> ARMTForCausalLM:
        torch.manual_seed(0)
        backbone = tiny_backbone(FAMILIES["llama"]).float()
        return ARMTForCausalLM.from_backbone(backbone, segment_size=8, num_mem_tokens=3, d_mem=4)

    @pytest.fixture
    def files(self, trained, tmp_path: Path) -> tuple[Path, Path]:
        """A checkpoint under the names of the authors' training scripts, and its backbone."""
        theirs = {"memory_query": "W_mq", "memory_key": "W_mk", "memory_value": "W_mv", "memory_beta": "W_mb"}
        tensors = {}
        for name, tensor in trained.state_dict().items():
            name = re.sub(r"^memory_tokens\.weight$", "memory", name)
            name = re.sub(r"^model\.model\.layers\.(\d+)\.", r"model.model.layers.\1.layer.", name)
            name = re.sub(
                r"^memory\.(\d+)\.(\w+)", lambda match: f"model.model.layers.{match[1]}.{theirs[match[2]]}", name
            )
            tensors[f"memory_cell.{name}"] = tensor
        save_file(tensors, tmp_path / "model.safetensors")
        trained.model.save_pretrained(tmp_path / "backbone")
        return tmp_path / "model.safetensors", tmp_path / "backbone"

    @pytest.mark.filterwarnings("ignore:.*without a tokenizer")
    @torch.no_grad()
    def test_imports(self, run, files, trained, tmp_path):
        checkpoint, backbone = files
        options = ["--segment-size", "8", "--variant", "v2", "--out", tmp_path / "armt"]
        assert run("import", checkpoint, "--backbone", backbone, *options).code == 0
        imported, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "armt"), torch.arange(30)[None]
        torch.testing.assert_close(imported(ids).logits, trained(ids).logits)

    @pytest.mark.filterwarnings("ignore:.*without a tokenizer")
    def test_flags_arrive(self, run, files, tmp_path):
        checkpoint, backbone = files
        options = ["--segment-size", "8", "--variant", "paper", "--no-correction", "--no-denom"]
        assert run("import", checkpoint, "--backbone", backbone, *options, "--out", tmp_path / "armt").code == 0
        config = ARMTConfig.from_pretrained(tmp_path / "armt")
        assert (config.normalize_features, config.correction, config.use_denom) == (False, False, False)

    def test_truncated_checkpoint(self, fails, files, tmp_path):
        checkpoint, backbone = files
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        options = ["--segment-size", "8", "--variant", "v2", "--out", tmp_path / "armt"]
        assert str(checkpoint) in fails("import", checkpoint, "--backbone", backbone, *options)
        assert not (tmp_path / "armt").exists()


class TestGenerate:
    @pytest.fixture
    def memory(self, run, folder, tmp_path) -> Path:
        """What `--save-memory` leaves of the prompt."""
        file = tmp_path / "memory.safetensors"
        run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 0, "--save-memory", file)
        return file

    def test_prints_what_the_model_writes(self, run, folder):
        outcome = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20)
        assert outcome.code == 0
        assert outcome.out.strip() == expected_text(folder, PROMPT).strip()

    def test_prompt_from_a_file(self, run, folder, tmp_path):
        (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
        outcome = run("generate", folder, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 20)
        assert outcome.out.strip() == expected_text(folder, PROMPT).strip()

    def test_the_newline_that_ends_a_file_is_not_read(self, run, folder, tmp_path):
        """Editors put one there. A blank line before it is the text's own."""
        for end, read in (("\n", ""), ("\r\n", ""), ("\n\n", "\n")):
            (tmp_path / "prompt.txt").write_bytes(f"{PROMPT}{end}".encode())
            outcome = run("generate", folder, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 0)
            assert outcome.report()["read"] == count_tokens(folder, PROMPT + read)

    @pytest.mark.parametrize("text", [PROMPT, PROMPT * 100], ids=["short", "long"])
    def test_prompt_from_mapped_ids(self, run, folder, tmp_path, text):
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
        outcome = run("generate", folder, "--prompt-ids", tmp_path / "ids.npy", "--max-new-tokens", 20)
        assert outcome.report()["read"] == len(ids)
        assert outcome.out.strip() == expected_text(folder, text).strip()

    def test_ids_need_no_tokenizer(self, run, fails, folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / "bare")
        ids = np.arange(5, 45)
        np.save(tmp_path / "ids.npy", ids)
        outcome = run("generate", tmp_path / "bare", "--prompt-ids", tmp_path / "ids.npy", "--max-new-tokens", 4)
        new = model.generate(torch.from_numpy(ids)[None], max_new_tokens=4)[0, len(ids) :]
        assert (outcome.code, outcome.out) == (0, " ".join(map(str, new.tolist())) + "\n")
        assert "has no tokenizer" in fails("generate", tmp_path / "bare", "--prompt", PROMPT)

    def test_a_checkpoint_that_lacks_weights(self, fails, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "torn")
        weights = load_file(folder / "model.safetensors")
        del weights["memory.0.memory_value.weight"]
        save_file(weights, tmp_path / "torn" / "model.safetensors", {"format": "pt"})
        assert "lacks 1 of its weights: memory.0.memory_value" in fails("generate", tmp_path / "torn", "--prompt", "A")

    @pytest.mark.parametrize("ids", [np.ones(3), np.ones((2, 3), int)], ids=["floats", "rows"])
    def test_prompt_ids_that_are_none(self, fails, folder, tmp_path, ids):
        np.save(tmp_path / "ids.npy", ids)
        assert "ids.npy does not hold token ids" in fails("generate", folder, "--prompt-ids", tmp_path / "ids.npy")

    @pytest.mark.parametrize("content", [b"text", b"\x93NUMPY\x01"])
    def test_prompt_ids_in_another_format(self, fails, folder, tmp_path, content):
        (tmp_path / "ids.npy").write_bytes(content)
        assert "ids.npy" in fails("generate", folder, "--prompt-ids", tmp_path / "ids.npy")

    def test_empty_prompt_ids(self, fails, folder, tmp_path):
        np.save(tmp_path / "ids.npy", np.array([], int))
        assert "empty" in fails("generate", folder, "--prompt-ids", tmp_path / "ids.npy")

    def test_prompt_id_outside_the_vocabulary(self, fails, folder, tmp_path):
        np.save(tmp_path / "ids.npy", np.array([1, -2, 3]))
        assert "token 1 is -2" in fails("generate", folder, "--prompt-ids", tmp_path / "ids.npy")

    def test_closing_line_reports_tokens_speed_and_memory(self, run, folder):
        report = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20).report()
        assert (report["read"], report["new"]) == (count_tokens(folder, PROMPT), 20)
        assert report["peak"] > 50

    def test_no_new_tokens_only_reads(self, run, folder):
        outcome = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 0)
        assert outcome.out == ""
        assert outcome.report()["new"] is None

    def test_long_prompt_is_read_in_pieces(self, run, folder, tmp_path):
        text = PROMPT * 100
        (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
        outcome = run("generate", folder, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 20)
        assert outcome.report()["read"] == count_tokens(folder, text) > 4096
        assert outcome.out.strip() == expected_text(folder, text).strip()

    def test_saved_memory_goes_on_where_the_text_ended(self, run, folder, memory):
        outcome = run("generate", folder, "--load-memory", memory, "--prompt", QUESTION, "--max-new-tokens", 20)
        assert outcome.out.strip() == expected_text(folder, PROMPT, QUESTION).strip()

    def test_memory_makes_a_difference(self, run, folder):
        outcome = run("generate", folder, "--prompt", QUESTION, "--max-new-tokens", 20)
        assert outcome.out.strip() != expected_text(folder, PROMPT, QUESTION).strip()

    def test_memory_is_saved_before_anything_is_generated(self, run, folder, memory, tmp_path):
        other = tmp_path / "other.safetensors"
        run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--save-memory", other)
        ours, theirs = load_file(memory), load_file(other)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_memory_can_be_replaced_by_what_follows(self, run, folder, memory):
        options = ["--load-memory", memory, "--save-memory", memory]
        assert run("generate", folder, *options, "--prompt", QUESTION, "--max-new-tokens", 0).code == 0
        tokens = AutoModelForCausalLM.from_pretrained(folder).load_memory(memory).tokens
        assert tokens == [count_tokens(folder, PROMPT) + len(AutoTokenizer.from_pretrained(folder).encode(QUESTION))]

    @pytest.mark.parametrize("prompt", ["", " \n\t"])
    def test_empty_prompt(self, fails, folder, prompt):
        assert "empty" in fails("generate", folder, "--prompt", prompt)

    def test_empty_prompt_file(self, fails, folder, tmp_path):
        (tmp_path / "prompt.txt").touch()
        assert "empty" in fails("generate", folder, "--prompt-file", tmp_path / "prompt.txt")

    def test_missing_prompt_file(self, fails, folder, tmp_path):
        assert "prompt.txt" in fails("generate", folder, "--prompt-file", tmp_path / "prompt.txt")

    def test_prompt_file_that_is_not_text(self, fails, folder, tmp_path):
        (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\x00")
        assert "prompt.txt" in fails("generate", folder, "--prompt-file", tmp_path / "prompt.txt")

    def test_missing_folder(self, fails, tmp_path):
        assert "missing" in fails("generate", tmp_path / "missing", "--prompt", PROMPT)

    def test_plain_backbone(self, fails):
        assert "armt convert" in fails("generate", BACKBONE, "--prompt", PROMPT)

    def test_negative_number_of_tokens(self, fails, folder):
        assert "--max-new-tokens is -1" in fails("generate", folder, "--prompt", PROMPT, "--max-new-tokens", -1)

    def test_memory_of_another_model(self, fails, folder, memory, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.memory["0"].memory_beta.bias.data.add_(1)
        model.save_pretrained(tmp_path / "other")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "other")
        line = fails("generate", tmp_path / "other", "--load-memory", memory, "--prompt", QUESTION)
        assert "another model" in line

    def test_missing_memory(self, fails, folder, tmp_path):
        line = fails("generate", folder, "--load-memory", tmp_path / "none", "--prompt", QUESTION)
        assert str(tmp_path / "none") in line

    def test_truncated_memory(self, fails, folder, memory):
        memory.write_bytes(memory.read_bytes()[:-100])
        line = fails("generate", folder, "--load-memory", memory, "--prompt", QUESTION)
        assert str(memory) in line

    def test_memory_that_cannot_be_saved(self, fails, folder, tmp_path):
        file = tmp_path / "missing" / "memory"
        assert str(file.parent) in fails("generate", folder, "--prompt", PROMPT, "--save-memory", file)

    def test_full_disk_leaves_the_old_memory_whole(self, fails, folder, memory):
        before = memory.read_bytes()
        with full_disk(100_000):
            line = fails("generate", folder, "--prompt", PROMPT * 2, "--save-memory", memory)
        assert "too large" in line
        assert memory.read_bytes() == before
        assert list(memory.parent.iterdir()) == [memory]


class TestProcess:
    """What only shows from outside."""

    def test_from_backbone_to_answer(self, tmp_path):
        """The two commands of a newcomer, each in a process of its own."""
        result = armt("convert", BACKBONE, "--out", "armt", "--segment-size", 32, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        result = armt("generate", "armt", "--prompt", PROMPT, "--max-new-tokens", 20, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
        assert REPORT.match(result.stderr.splitlines()[-1])

    def test_error_is_a_line_and_an_exit_code(self, tmp_path):
        result = armt("generate", "missing", "--prompt", PROMPT, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith("armt: ")

    def test_interrupt_leaves_the_old_memory_whole(self, folder, tmp_path):
        (tmp_path / "memory").write_text("old")
        (tmp_path / "prompt.txt").write_text(PROMPT * 5000, encoding="utf-8")
        command = [sys.executable, "-m", "modeling_armt.conversion", "generate", str(folder)]
        command += ["--prompt-file", "prompt.txt", "--save-memory", "memory"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            seen = b""
            while b"reading:" not in seen:  # the progress bar of the long prompt
                seen += os.read(process.stderr.fileno(), 1000)
                assert process.poll() is None, seen
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate()
        assert process.returncode == 130
        assert b"armt: interrupted" in rest and b"Traceback" not in rest
        assert (tmp_path / "memory").read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"memory", "prompt.txt"}

    def test_peak_memory_is_that_of_the_command(self, folder):
        """Not that of the process which started it."""
        ballast = torch.ones(2**28)
        result = armt("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 0)
        peak = REPORT.match(result.stderr.splitlines()[-1])["peak"]
        assert int(peak.replace(",", "")) < ballast.nbytes / 2**20
