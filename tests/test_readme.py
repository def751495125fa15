"""What a newcomer types must work as written: the blocks of the README run in order, in one fresh folder."""

import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import users_environment

from modeling_armt.conversion.cli import build_parser


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.replace("\\\n", " "), flags=re.M | re.S)
# Where a block says that it needs one of the extras.
EXTRAS = {"openai": "openai", "armt serve": "fastapi", "trl": "trl", "torchao": "torchao", "matplotlib": "matplotlib"}
# What a fast test does not wait for. Of an option that is there twice the last one counts.
SHORT = {
    "train": "--steps 1 --batch-size 2 --validation-samples 2 --workers 0",
    "evaluate": "--samples 2 --lengths 256",
}

# `python` is one session, as `bash` is, and a block of `py` a script of its own.
RUNNER = """
import json, os, shlex, socket, sys, threading, time
from modeling_armt.conversion.cli import main

blocks, short = json.load(sys.stdin)
session = {"__name__": "__main__"}

def serve(arguments, port):
    threading.Thread(target=main, args=[arguments], daemon=True).start()
    for _ in range(600):
        with socket.socket() as listener:
            if listener.connect_ex(("localhost", int(port))) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server does not answer")

for language, block in blocks:
    print("+++", block, sep="\\n", flush=True)
    if language in ("python", "py"):
        exec(compile(block, "README.md", "exec"), session if language == "python" else {"__name__": "__main__"})
        continue
    for line in block.splitlines():
        arguments = shlex.split(line, comments=True)[1:] + shlex.split(short.get(line.split()[1], ""))
        if arguments[0] == "serve":
            serve(arguments, arguments[-1])
        elif main(arguments):
            sys.exit(f"failed: {line}")
os._exit(0)  # whatever the server is doing
"""


def armt_commands(text: str) -> list[list[str]]:
    """The arguments of every `armt` command in blocks of code, synopses aside."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"armt [^\[|]*$", line)]


def runs_here(block: str) -> bool:
    """Whether what the block needs is installed; the rest a reader has to fetch from the net."""
    wanted = [module for word, module in EXTRAS.items() if word in block]
    return all(importlib.util.find_spec(module) for module in wanted)


@pytest.mark.parametrize("short", [SHORT, pytest.param({}, marks=pytest.mark.slow)], ids=["shortened", "as written"])
def test_blocks_run_in_order(tmp_path, short):
    with socket.create_server(("localhost", 0)) as listener:
        port = str(listener.getsockname()[1])
    blocks = [
        (language, block.replace("localhost:8000", f"localhost:{port}"))
        for language, block in BLOCKS
        if language in ("python", "py") or (language == "bash" and re.fullmatch(r"(armt [^\[|]*\n)+", block))
    ]
    assert len(blocks) >= 10
    environment = users_environment(HF_MODULES_CACHE=str(tmp_path / "modules"), CUDA_VISIBLE_DEVICES="")
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([[b for b in blocks if runs_here(b[1])], short | {"serve": f"--port {port}"}]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert "ARMTCache(tokens=[" in result.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"my-armt-trained", "my-armt-passkey", "results", "card.md", "inspect.html"}


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("model_cards/**/README.md")], ids=str)
def test_commands_are_understood(path):
    for arguments in armt_commands(path.read_text(encoding="utf-8")):
        build_parser().parse_args(arguments)


def test_synopses_have_options_that_there_are():
    synopses = next(block for _, block in BLOCKS if "armt convert BACKBONE" in block)
    (verbs,) = [action.choices for action in build_parser()._actions if hasattr(action.choices, "values")]
    lines = re.sub(r"\n +", " ", synopses).splitlines()
    assert {line.split()[1] for line in lines} == {*verbs}
    for line in lines:
        options = {option for action in verbs[line.split()[1]]._actions for option in action.option_strings}
        assert {*re.findall(r"(?<!\w)--[\w-]+", line)} <= options, line


def test_make_has_the_targets_of_the_readme():
    targets = re.findall(r"^make (\w+)", README, flags=re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_lm_eval_has_the_task_of_the_readme():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra: pip install 'modeling-armt[eval]'")
    (name,) = re.findall(r"lm_eval .*?--tasks (\w+)", README, flags=re.S)
    assert name in tasks.TaskManager().all_tasks


def test_extras_are_named_before_what_needs_them():
    for extra, use in {
        "plots": "armt inspect",
        "serve": "armt serve",
        "eval": "lm_eval --",
        "quant": "torchao.",
    }.items():
        assert README.index(f"pip install '.[{extra}]'") < README.index(f"\n{use}" if use[0] == "a" else use), extra


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
