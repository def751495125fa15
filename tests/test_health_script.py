"""model_cards/health.py: what it reads, and that it records what the cache says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import symbol_model, with_memory
from helpers import load_script
from transformers import AutoTokenizer

from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval
from modeling_armt.conversion.tasks.babilong import Babilong


SEGMENTS, ROWS = 40, 2


@pytest.fixture(scope="module")
def script():
    return load_script("health.py")


@pytest.fixture(scope="module")
def written(script, tmp_path_factory) -> Path:
    """What the command writes of a tiny model."""
    folder = tmp_path_factory.mktemp("health")
    with_memory(symbol_model(layers=2)).save_pretrained(folder / "tiny")
    arguments = [folder / "tiny", "--task", "associative_retrieval", "--segments", SEGMENTS, "--rows", ROWS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["health.py", *map(str, arguments), "--out", str(folder / "out")])
        script.main()
    return folder


def test_points_are_dense_where_a_text_begins(script):
    assert script.points(40) == [1, 2, 5, 10, 20, 21, 22, 25, 30, 40]


def test_pairs_change_into_pairs_of_two_keys(script):
    task, rng = AssociativeRetrieval(key_size=2), np.random.default_rng(0)
    first, second = (script.draw(task, changed, 3, 500 * task.pair_size, rng) for changed in (False, True))
    assert first.shape == second.shape == (3, 500 * task.pair_size)
    keys = [{tuple(pair[:2]) for pair in text.reshape(-1, task.pair_size)} for text in (first, second)]
    assert len(keys[0]) > 200 and len(keys[1]) == 2


def test_novels_change_into_stories(script, tmp_path):
    books = tmp_path / "novels"
    books.mkdir()
    for number in range(30):
        (books / f"book{number}.txt").write_text("The harbour was quiet. Nobody had seen the ship. " * 40)
    task = Babilong("qa1", AutoTokenizer.from_pretrained(BACKBONE), None, books, tmp_path / "cache")
    texts = [script.draw(task, changed, 2, 300, np.random.default_rng(0)) for changed in (False, True)]
    novels, stories = (task.tokenizer.decode(text[1].tolist()) for text in texts)
    assert texts[0].shape == texts[1].shape == (2, 300)
    assert "harbour" in novels and "kitchen" not in novels
    assert "kitchen" in stories and "harbour" not in stories


def test_records_what_the_cache_says(script, written):
    """The worst row, at the end and where the text changes."""
    content = json.loads((written / "out" / "health.json").read_text())
    model, task = script.armt_model(script.load_checkpoint(written / "tiny")[0]), AssociativeRetrieval()
    rng, size, cache, read = np.random.default_rng(0), task.pair_size, None, 0
    for record in content["points"]:
        text = script.draw(task, read >= SEGMENTS // 2, ROWS, (record["segments"] - read) * size, rng)
        cache, read = model.read(torch.from_numpy(text), cache).cache, record["segments"]
        for layer, stats in cache.stats().items():
            found = record["layers"][str(layer)]
            for name, worst in (("A_norm", max), ("max_read_ratio", max), ("min_kz_ratio", min)):
                if None in stats[name]:  # nothing of the kind in the first segment
                    assert read == 1 and name not in found
                else:
                    assert found[name] == pytest.approx(worst(stats[name]), rel=1e-4)
    assert read == SEGMENTS and cache.segments == [SEGMENTS] * ROWS


def test_draws_it(written):
    assert (written / "out" / "health.png").stat().st_size > 10_000
