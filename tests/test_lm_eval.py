"""
EleutherAI's lm-eval on an ARMT checkpoint, with the stock `--model hf`.

lm-eval cuts a text off on the left at `max_length` tokens, which it takes from the backbone's configuration unless it
is told otherwise. An ARMT model reads on where the backbone ends, so it has to be told.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import users_environment
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.tasks.passkey import Passkey


pytest.importorskip("lm_eval", reason="needs the extra: pip install 'modeling-armt[eval]'")
POSITIONS = 64  # of the backbone
TEXT = "The old house stood at the end of the road, and nobody lived in it any more. " * 8
ENDLESS = "max_length=1000000"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {samples}
test_split: train
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {tokens}
filter_list:
  - name: answer
    filter:
      - function: regex
        regex_pattern: {pattern}
      - function: take_first
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random model with memories that matter, whose backbone knows few positions."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options = {"max_position_embeddings": POSITIONS, "initializer_range": 0.2}
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, **options, num_attention_heads=4))
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=16, num_mem_tokens=2, d_mem=16)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.1)
    words = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isalpha()]
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - set(words))
    folder = tmp_path_factory.mktemp("lm_eval") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> ARMTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def harness(checkpoint: Path, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), trust_remote_code=True, device="cpu", batch_size=2, **options)


def request(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def log_likelihoods(model, ids: list[int]) -> torch.Tensor:
    """Of each id but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_without_max_length_texts_are_cut_off_at_the_backbones_positions(checkpoint):
    assert harness(checkpoint).max_length == POSITIONS


def test_the_likelihood_of_a_continuation_is_that_of_the_whole_text(checkpoint, model, tokenizer):
    endings = [" It was cold.", " It was cold and dark in there, and the wind blew."]
    requests = [request("loglikelihood", TEXT.strip(), ending) for ending in endings]
    found = harness(checkpoint, max_length=10**6).loglikelihood(requests)
    start = len(tokenizer(TEXT.strip())["input_ids"])
    assert start > 2 * POSITIONS
    for ending, (likelihood, _) in zip(endings, found, strict=True):
        ids = tokenizer(TEXT.strip() + ending)["input_ids"]
        assert likelihood == pytest.approx(log_likelihoods(model, ids)[start - 1 :].sum().item(), rel=1e-4)


def test_the_rolling_likelihood_is_that_of_one_text(checkpoint, model, tokenizer):
    lm = harness(checkpoint, max_length=10**6)
    ids = [lm.prefix_token_id, *tokenizer(TEXT)["input_ids"]]
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", TEXT)])
    assert found[0] == pytest.approx(log_likelihoods(model, ids).sum().item(), rel=1e-4)


def lm_eval(folder: Path, checkpoint: Path, *model_args: str, task: str) -> float:
    """The command, as the README has it. Returns the score."""
    arguments = ",".join([f"pretrained={checkpoint}", "trust_remote_code=True", *model_args])
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--include_path", str(folder), "--tasks", task, "--batch_size", "8", "--output_path", "out"]
    environment = users_environment(CUDA_VISIBLE_DEVICES="", HF_HOME=str(folder / "cache"))
    subprocess.run(command, cwd=folder, env=environment, check=True)
    results = sorted(folder.glob("out/**/results_*.json"), key=lambda path: path.stat().st_mtime)[-1]
    return json.loads(results.read_text())["results"][task]["exact_match,answer"]


def write_task(folder: Path, name: str, samples: list[dict], tokens: int, pattern: str) -> None:
    """A task on data of one's own: a YAML file and its samples."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    task = TASK.format(name=name, samples=path, tokens=tokens, pattern=pattern)
    (folder / f"{name}.yaml").write_text(task, encoding="utf-8")


def test_a_task_of_ones_own(checkpoint, model, tokenizer, tmp_path):
    """The right answers are what the model says after the whole text, so the score is 1 if it was given all of it."""
    samples = []
    for number in range(20):
        prompt = f"Number {number} lived here. {TEXT}"
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
        samples.append({"prompt": prompt, "answer": answer})
    write_task(tmp_path, "tiny", samples, tokens=4, pattern="(.+)")
    assert lm_eval(tmp_path, checkpoint, ENDLESS, task="tiny") == 1
    assert lm_eval(tmp_path, checkpoint, task="tiny") < 0.5


@pytest.mark.slow
def test_the_score_is_that_of_armt_evaluate(tmp_path):
    """On the same 200 samples, with a model that was trained on shorter ones."""

    def armt(*arguments: str):
        command = [sys.executable, "-m", "modeling_armt.conversion", *map(str, arguments)]
        subprocess.run(command, cwd=tmp_path, check=True)

    sizes = ("--segment-size", 64, "--num-mem-tokens", 4, "--d-mem", 32, "--dtype", "float32")
    armt("convert", BACKBONE, "--out", "converted", *sizes)
    task = ("--task", "passkey", "--task-option", "digits=2")
    steps = ("--stages", 1, 2, 4, "--steps", 300, "--until", 0.9, "--eval-steps", 25, "--validation-samples", 66)
    rates = ("--lr", 2e-3, "--memory-lr", 4e-3, "--warmup-steps", 20, "--batch-size", 32, "--workers", 0)
    armt("train", "converted", *task, *steps, *rates, "--out", "adapter")
    armt("merge", "adapter", "--out", "trained")
    armt("evaluate", "trained", *task, "--lengths", 500, "--samples", 200, "--controls", "off", "--out", "results")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    scores = results["runs"][0]["lengths"][0]["scores"]
    assert scores["memory"]["mean"] > scores["memory off"]["mean"] + 0.3

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    passkey = Passkey(tokenizer, digits=2)
    samples = []
    for sample in passkey.test(500, 200):
        prompt = tokenizer.decode(sample["input_ids"][: sample["prompt_length"]])
        samples.append({"prompt": prompt, "answer": sample["answer"]})
    write_task(tmp_path, "passkey", samples, passkey.max_new_tokens, pattern=r"(\d+)")
    assert lm_eval(tmp_path, tmp_path / "trained", ENDLESS, task="passkey") == scores["memory"]["mean"]
    assert lm_eval(tmp_path, tmp_path / "trained", task="passkey") < scores["memory"]["mean"] - 0.1
