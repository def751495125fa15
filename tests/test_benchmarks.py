"""The benchmarks run small on a CPU: every command measures what it promises, and the figures come from its files."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_armt import ARMTForCausalLM


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # they are not installed

from benchmarks import decode, drift, measuring, memory, models, plot, prefill, requests, results, training  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TINY = ["--shape", "tiny", "--segment-size", "16", "--num-mem-tokens", "2", "--d-mem", "8"]
TIMED = {"median_s", "samples_s", "first_call_s", "peak_gib"}
FLOPS_OF_A_LAYER = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Also on a machine with a GPU, and without waiting for a compiler, which other tests do."""
    monkeypatch.setattr(ARMTForCausalLM, "compile_armt", lambda model, enabled=True: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (decode, drift, memory, prefill, requests, results, training):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
        if hasattr(module, "DTYPE"):
            monkeypatch.setattr(module, "DTYPE", torch.float32)


def run(module, path: Path, *options: str) -> dict:
    """What a command wrote."""
    module.main([*TINY, *options, "--out", str(path)])
    content = json.loads(path.read_text())
    assert not [row for row in content["rows"] if "error" in row]
    assert content["environment"]["torch"] == version("torch")
    assert content["settings"]["segment_size"] == 16
    return content


def names(content: dict) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in content["rows"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


class TestCommands:
    def test_prefill(self, folder):
        content = run(prefill, folder / "prefill.json", "--lengths", "100", "40", "--profile")
        assert names(content) == ["ours", "ours-eager", "ours-sequential", "full-attention"]
        assert [row["tokens"] for row in content["rows"]] == [40, 100] * 4
        assert all(set(row) >= {*TIMED, "tokens_per_s", "speed_up"} for row in content["rows"])
        assert all(len(row["samples_s"]) >= 3 for row in content["rows"])
        floor = 100 * 18 / 16 * 3 * FLOPS_OF_A_LAYER / content["ceilings"]["matmul_tflops"] / 1e12
        assert content["rows"][1]["floor_s"] == pytest.approx(floor)
        assert content["rows"][0]["cold_start_s"] > 0
        assert {"name", "count", "total_ms", "share"} == set(content["profile"][0])

    def test_decode(self, folder):
        content = run(decode, folder / "decode.json", "--context", "20", "--new-tokens", "50", "--short", "4")
        assert names(content) == [
            *("ours", "ours-steady", "ours-generate", "ours-eager"),
            *("full-attention", "full-attention-static"),
        ]
        assert {row["batch"] for row in content["rows"]} == {1, 2}
        assert all(set(row) >= {*TIMED, "ms_per_step", "bandwidth_share"} for row in content["rows"])
        assert content["state_bytes_per_row"] == 3 * (48 * 64 + 48) * 4

    def test_training(self, folder):
        content = run(training, folder / "training.json", "--segments", "2", "--repeats", "1")
        assert names(content) == ["ours", "ours-sequential", "full-attention"]
        assert [row["checkpointing"] for row in content["rows"]] == [False, True] * 3
        assert all(set(row) >= {*TIMED, "tokens_per_s", "matmul_share"} for row in content["rows"])
        assert "2 FLOPs" in content["flops_count"]

    def test_memory(self, folder):
        content = run(memory, folder / "memory.json", "--lengths", "32", "100")
        kept = {(row["name"], row["tokens"]): row["kept_gib"] * 2**30 for row in content["rows"]}
        state = 3 * (48 * 64 + 48) * 4
        assert kept["ours", 32] == pytest.approx(state)
        assert kept["full-attention", 100] == pytest.approx(100 * 3 * 2 * 32 * 4)
        assert all(set(row) >= TIMED for row in content["rows"])

    def test_requests(self, folder):
        content = run(requests, folder / "requests.json", "--rows", "3", "--length", "40", "--rows-per-call", "2")
        assert names(content) == ["ours", "ours-sequential", "full-attention"]
        assert all(row["rows_per_call"] == 2 and row["tokens"] == 120 for row in content["rows"])

    def test_drift(self, folder):
        content = run(drift, folder / "drift.json", "--length", "100", "--columns", "10")
        assert names(content) == ["diagonal", "diagonal-eager", "sequential"]
        for row in content["rows"]:
            assert set(row["A_error"]) == set(row["z_error"]) == {"0", "1", "2"}
            assert 0 < row["worst_A_error"] < 0.1
            assert 0 < row["logits_error"] < 0.1
            assert row["argmax_agreement"] > 0.5

    def test_skip(self, tmp_path):
        options = ["--lengths", "40", "--skip", "ours-eager", "full-attention"]
        assert names(run(prefill, tmp_path / "p.json", *options)) == ["ours", "ours-sequential"]

    @pytest.mark.parametrize("installed", [True, False])
    def test_in_a_process_of_its_own(self, tmp_path, installed):
        """From the root of a checkout, whether the package is installed or not."""
        code = "" if installed else "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        code = f"import runpy, sys\n{code}runpy.run_module('benchmarks.training', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", code, *TINY, "--repeats", "1", "--skip", "ours", "full-attention"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        command += ["--out", str(tmp_path / "t.json")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert names(json.loads((tmp_path / "t.json").read_text())) == ["ours-sequential"]
        assert "training on CPU" in result.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Results as the commands write them."""
    folder = tmp_path_factory.mktemp("measured")
    common = {"environment": {"device": "CPU", "torch": "2"}, "settings": {"shape": "tiny"}}
    timed = {"median_s": 1.0, "peak_gib": 1.0, "tokens_per_s": 5.0, "bandwidth_share": 0.5}
    cases = {
        "prefill": [
            {"name": "ours", "tokens": 1024, "floor_s": 0.5},
            {"name": "ours", "tokens": 2048, "floor_s": 1.0},
            {"name": "full-attention", "tokens": 1024, "backend": "flash"},
        ],
        "decode": [{"name": "ours", "batch": 1}, {"name": "full-attention", "batch": 32}],
        "training": [{"name": "ours", "batch": 1, "checkpointing": True}],
    }
    for name, rows in cases.items():
        rows = [{**timed, **row} for row in rows] + [{**rows[-1], "error": "out of memory"}]
        (folder / f"{name}.json").write_text(json.dumps({**common, "benchmark": name, "rows": rows}))
    return folder


class TestFigures:
    def test_come_from_the_files(self, measured, tmp_path):
        paths = plot.main(["--results", str(measured), "--out", str(tmp_path)])
        assert {path.name for path in paths} == {"lengths.png", "decode.png", "training.png"}
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

    def test_come_from_what_there_is(self, measured, tmp_path):
        (tmp_path / "decode.json").write_text((measured / "decode.json").read_text())
        assert plot.main(["--results", str(tmp_path)]) == [tmp_path / "decode.png"]

    def test_without_results(self, tmp_path):
        with pytest.raises(SystemExit, match="2"):
            plot.main(["--results", str(tmp_path)])

    @pytest.mark.parametrize(("count", "text"), [(512, "512"), (131_072, "128k"), (10_485_760, "10M"), (1500, "1.5k")])
    def test_short_counts(self, count, text):
        assert plot.short_count(count) == text


class TestMeasuring:
    def test_counts_the_calls(self):
        calls = []
        measured = measuring.measure(lambda: calls.append(1), repeats=4, warmup=2)
        assert (len(calls), len(measured["samples_s"])) == (6, 4)

    def test_failure_is_a_result(self, capsys):
        assert measuring.measure(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}
        assert "Traceback" in capsys.readouterr().err

    def test_out_of_memory_halves_the_rows(self):
        def call(rows: int) -> dict:
            return {"error": "out of memory"} if rows > 20 else {"median_s": 1.0}

        assert requests.largest_that_fits(64, call) == {"rows_per_call": 16, "median_s": 1.0}

    def test_out_of_memory_at_one_row(self):
        measured = requests.largest_that_fits(3, lambda rows: {"error": "out of memory"})
        assert measured == {"rows_per_call": 1, "error": "out of memory"}

    def test_results_are_on_disk_after_every_row(self, tmp_path):
        args = results.make_parser("x", "", ()).parse_args(["--out", str(tmp_path / "deep" / "x.json")])
        output = results.Results("x", args)
        output.add("a", tokens=1)
        assert json.loads(args.out.read_text())["rows"] == [{"name": "a", "tokens": 1}]
        assert [path.name for path in args.out.parent.iterdir()] == ["x.json"]


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return models.build_armt("tiny", torch.device("cpu"), torch.float32, 16, 2, 8)


class TestModels:
    @torch.no_grad()
    def test_memory_matters_and_stays_bounded(self, model):
        states = [model.read(torch.randint(512, (n,))).cache.states[1].A.norm() for n in (160, 3200)]
        assert 0 < states[0] < states[1] * 10 < states[0] * 1000

    @torch.no_grad()
    def test_stock_backbone_shares_the_weights(self, model):
        stock, ids = models.stock_backbone(model), torch.arange(10)[None]
        assert type(stock) is type(model.model)
        assert not [module for module in stock.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert (
            stock.model.layers[0].mlp.up_proj.weight.data_ptr()
            == model.decoder.layers[0].mlp.up_proj.weight.data_ptr()
        )
        assert torch.equal(stock(ids).logits, model(ids).logits)
        assert models.count_parameters(stock) == models.count_parameters(model.model)

    def test_same_seed_same_model(self, model):
        other = models.build_armt("tiny", torch.device("cpu"), torch.float32, 16, 2, 8)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    @pytest.mark.parametrize(("shape", "size"), [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)])
    def test_sizes_of_the_shapes(self, shape, size):
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(LlamaConfig(**models.SHAPES[shape]))
        assert models.count_parameters(backbone) == size

    def test_full_attention_loss_is_the_stock_loss(self, model):
        stock, ids = models.stock_backbone(model), torch.randint(512, (2, 20))
        loss = training.full_attention_loss(stock, ids, chunk=7)
        torch.testing.assert_close(loss, stock(ids, labels=ids).loss)

    def test_checkpointing_keeps_the_gradients_of_adapters(self, model):
        stock, ids = models.stock_backbone(model).train(), torch.randint(512, (2, 20))
        stock.requires_grad_(False)
        weight = stock.model.layers[0].mlp.up_proj.weight.requires_grad_()
        gradients = []
        for enabled in (False, True):
            training.set_checkpointing(stock, enabled)
            gradients += torch.autograd.grad(training.full_attention_loss(stock, ids, 8), weight)
        torch.testing.assert_close(*gradients)
