"""What a command takes and what it leaves: common options, and a JSON file that grows row by row."""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .models import SHAPES


RESULTS = Path(".cache/benchmarks")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def on_gpu(large: Any, small: Any) -> Any:
    """A default for a GPU, and one for a machine without."""
    return large if DEVICE.type == "cuda" else small


def make_parser(name: str, question: str, alternatives: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=question,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default=on_gpu("llama-3.2-1b", "tiny"), help="of the backbone")
    parser.add_argument("--segment-size", type=int, default=on_gpu(1024, 64), help="tokens in a segment")
    parser.add_argument("--num-mem-tokens", type=int, default=on_gpu(128, 8), help="memory tokens of a segment")
    parser.add_argument("--d-mem", type=int, default=on_gpu(64, 16), help="width of memory queries and keys")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="+", default=[], choices=alternatives, help="alternatives to leave out")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    return parser


class Results:
    """
    The rows of one run, written after every one of them: a run that is cut off keeps what it has.

    Args:
        name: of the benchmark.
        args: its arguments.
        header: what holds for all rows, such as measured ceilings.
    """

    def __init__(self, name: str, args: argparse.Namespace, **header):
        self.path = args.out
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.content = {
            "benchmark": name,
            "environment": environment(),
            "settings": settings,
            **header,
            "rows": [],
        }
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, name: str, **row) -> dict[str, Any]:
        """Adds a row and says so."""
        row = {"name": name, **row}
        self.rows.append(row)
        self.write()
        print(json.dumps({key: _short(value) for key, value in row.items() if key != "samples_s"}), flush=True)
        return row

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def print_table(self, *columns: str) -> None:
        """A table of the given fields of all rows."""
        environment = self.content["environment"]
        table = Table("name", title=f"{self.content['benchmark']} on {environment['device']}")
        table.columns[0].no_wrap = True
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            cells = [row.get(column) for column in columns]
            if "error" in row and cells:
                cells[-1] = row["error"][:40]
            table.add_row(row["name"], *("" if cell is None else str(_short(cell)) for cell in cells))
        Console(width=max(120, Console().width)).print(table)
        print(f"written to {self.path}")


def environment() -> dict[str, Any]:
    """What a number means nothing without."""
    versions = {}
    for package in ("torch", "triton", "transformers", "peft", "flash-linear-attention"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        **versions,
        "python": sys.version.split()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": commit(),
    }


def command_line() -> str:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python -m", module.name if module else Path(sys.argv[0]).name, *sys.argv[1:]])


def commit() -> str | None:
    """The commit that is checked out, marked if the files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else value
