"""What a newcomer types must work as written: the Python blocks of the README run, in order, in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import users_environment

from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE


README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    environment = users_environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "ARMTCache(tokens=[" in result.stdout
    assert (tmp_path / "my-armt-trained" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_way_on_the_command_line_runs_as_written(tmp_path):
    convert(BACKBONE, tmp_path / "my-armt", segment_size=128, num_mem_tokens=8, d_mem=32)
    section = README.read_text(encoding="utf-8").split("## From a backbone to a published model")[1]
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "results.json").is_file() and (tmp_path / "inspect.html").is_file()


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing
