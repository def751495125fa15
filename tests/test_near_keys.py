"""model_cards/associative_retrieval/near_keys.py: how keys are told apart, and what is written of a model."""

import json
import sys

import pytest
from evaluation_models import symbol_model, with_memory
from helpers import load_script

from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval


@pytest.fixture(scope="module")
def script():
    return load_script("associative_retrieval/near_keys.py")


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        ([[4, 5, 6], [7, 8, 9]], "0 near keys"),
        ([[1, 2, 6], [7, 8, 9]], "1 near keys"),
        ([[1, 2, 6], [9, 2, 3]], "2 or more near keys"),
        ([[3, 1, 2], [1, 2, 6]], "same symbols"),
    ],
)
@pytest.mark.parametrize(("told", "half"), [(0, "first half"), (2, "second half")])
def test_a_key_is_near_what_differs_in_one_place(script, others, kind, told, half):
    task = AssociativeRetrieval(key_size=3, segment_size=6)
    keys = list(others)
    keys.insert(told, [1, 2, 3])
    body = [token for key in keys for token in (*key, 16, 5, 17)]
    sample = {
        "input_ids": [*body, 1, 2, 3, 16, 5, 17],
        "prompt_length": len(body) + 4,
        "fact_spans": [[6 * told, 6 * told + 6]],
    }
    assert script.kinds(task, sample) == ["all", kind, half]


def test_each_sample_is_counted_once_in_every_way(script, tmp_path, monkeypatch, capsys):
    with_memory(symbol_model(3, layers=2)).save_pretrained(tmp_path / "tiny")
    out = tmp_path / "near.json"
    arguments = [tmp_path / "tiny", "--pairs", 9, "--samples", 120, "--out", out]
    monkeypatch.setattr(sys, "argv", ["near_keys.py", *map(str, arguments)])
    script.main()
    written = json.loads(out.read_text())
    counts = {kind: score["samples"] for kind, score in written["models"]["tiny"].items()}
    halves = counts.pop("first half"), counts.pop("second half")
    assert counts.pop("all") == sum(counts.values()) == sum(halves) == 120
    assert written["pairs"] == 9 and {"command", "date", "device", "versions"} <= written["environment"].keys()
    assert "tiny " in capsys.readouterr().out
