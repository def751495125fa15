"""The whole way of a model, with every command: from a pretrained decoder to the Hub and into a stranger's process."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from local_hub import LocalHub, connected, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt.conversion.checkpoints import load_checkpoint
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.publishing import visits


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
PROMPT = "Once upon a time there was a little girl. " * 20
SEEDS = (0, 1, 2)

# Runs where this package cannot be imported: generates with a model and with an adapter, by revision.
STRANGER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from visitor import Absent
sys.meta_path.insert(0, Absent)

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, adapter, merged = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
found = {}
for auto, (name, revision) in ((AutoPeftModelForCausalLM, adapter), (AutoModelForCausalLM, merged)):
    model = auto.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found[name] = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist()
assert not any(name.partition(".")[0] == "modeling_armt" for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    with LocalHub(ann="hf_ann") as hub, connected(hub, tmp_path_factory.mktemp("client"), "hf_ann"):
        yield hub


@pytest.fixture(scope="module")
def stories() -> Path:
    """A pretrained Llama of 260,000 parameters that tells stories, or else that of the demonstration."""
    found = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
    return found if found.is_dir() else BACKBONE


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def published_at(hub: LocalHub, name: str) -> str:
    """The only commit that was published in a repository."""
    titles = [commit.title for _, commit in hub.repositories[name].history()]
    assert titles == [f"Publish {name.partition('/')[2]}", "initial commit"]
    return hub.repositories[name].branches["main"]


def generate(folder: Path) -> list[int]:
    model, tokenizer = load_checkpoint(folder, device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist()


def test_from_a_decoder_to_the_hub_and_back(hub, stories, tmp_path, capsys):
    folder = {name: tmp_path / name for name in ("armt", "evaluation", "merged", "card.md")}
    seeds = [tmp_path / f"seed{seed}" for seed in SEEDS]

    # Convert; the conversion is what adapters stand on, so it goes to the Hub first.
    run("convert", stories, "--out", folder["armt"], "--segment-size", 128, "--num-mem-tokens", 4, "--d-mem", 16)
    AutoModelForCausalLM.from_pretrained(folder["armt"]).push_to_hub("ann/armt")
    AutoTokenizer.from_pretrained(folder["armt"]).push_to_hub("ann/armt")

    # Train LoRA and memory for a few steps, three seeds; evaluate them together, with all controls.
    for seed, out in zip(SEEDS, seeds, strict=True):
        run(
            *("train", folder["armt"], "--task", "passkey", "--out", out, "--stages", 2, "--steps", 4, "--seed", seed),
            *("--batch-size", 2, "--validation-samples", 2, "--workers", 0, "--warmup-steps", 1),
        )
    run("evaluate", *seeds, "--task", "passkey", "--lengths", "300", "--samples", 4, "--out", folder["evaluation"])
    results = json.loads((folder["evaluation"] / "results.json").read_text())

    # The card.
    known = ["--results", folder["evaluation"]]
    if stories is not BACKBONE:  # whose licence is not beside it
        known += ["--license", "mit"]
    run("card", seeds[0], *known, "--out", folder["card.md"])
    card = ModelCard.load(folder["card.md"])
    assert card.data.license == ("apache-2.0" if stories is BACKBONE else "mit")
    own = results["runs"][0]["lengths"][0]["scores"]["memory"]["mean"]
    assert [result.metric_value for result in card.data.eval_results] == [own]
    assert len(re.findall(r"^\| 300 \|.*\| [012] \| .*%", card.text, flags=re.M)) == len(SEEDS)

    # Publish the adapter on its base, merge it, and publish that too.
    run("publish", seeds[0], "ann/lora", "--base", "ann/armt", *known)
    adapter = json.loads(hub.repositories["ann/lora"].files()["adapter_config.json"].content)
    assert adapter["base_model_name_or_path"] == "ann/armt"
    assert adapter["revision"] == hub.repositories["ann/armt"].branches["main"]
    run("merge", seeds[0], "--out", folder["merged"])
    run("publish", folder["merged"], "ann/merged", *known)
    assert "score_by_length.png" in hub.repositories["ann/merged"].files()
    assert set(hub.repositories["ann/lora"].files()) >= {"results.json", "training.json", "recipe.yaml", "README.md"}

    # The base moves on; who loads the adapter still gets what it was trained on.
    model = AutoModelForCausalLM.from_pretrained(folder["armt"])
    model.get_input_embeddings().weight.data.zero_()
    model.push_to_hub("ann/armt")

    # A stranger loads both by revision, and reads and writes as we do.
    revisions = [json.dumps([name, published_at(hub, name)]) for name in ("ann/lora", "ann/merged")]
    command = [sys.executable, "-P", "-c", STRANGER, str(visits.VISITOR.parent), PROMPT, *revisions]
    variables = environment(hub, tmp_path / "stranger", token=None)
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"ann/lora": generate(seeds[0]), "ann/merged": generate(folder["merged"])}
