"""`armt publish` against a Hub on this machine: what arrives, what is refused, and what an interrupt leaves behind."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluated
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, get_session
from huggingface_hub.utils import _http
from local_hub import LocalHub, connected, environment
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt import ARMTConfig, ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.provenance import describe_backbone
from modeling_armt.conversion.publishing import visits
from modeling_armt.conversion.publishing.facts import gather
from modeling_armt.conversion.publishing.folders import FolderError, inspect_folder
from modeling_armt.conversion.publishing.hub import HubError, Repository
from modeling_armt.conversion.publishing.publish import prepare
from modeling_armt.conversion.publishing.records import without_places
from modeling_armt.conversion.publishing.shards import shard


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with results, and with a file that is no part of it."""
    folder = tmp_path_factory.mktemp("publish") / "qa1"
    evaluated.checkpoint(folder)
    evaluated.evaluated(folder)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def changeable(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "qa1"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    """A Hub with two users, one of whom is logged in here."""
    with LocalHub(ann="hf_ann", ben="hf_ben") as hub, connected(hub, tmp_path_factory.mktemp("client"), "hf_ann"):
        yield hub


@pytest.fixture(scope="module")
def published(hub: LocalHub, folder: Path) -> str:
    """The name of the repository that the checkpoint is published in."""
    before = evaluated.contents(folder)
    assert main(["publish", str(folder), "ann/qa1"]) == 0
    assert evaluated.contents(folder) == before
    return "ann/qa1"


@pytest.fixture
def refused(hub: LocalHub, capsys) -> Callable[..., str]:
    """Publishes what has to fail; nothing may change, here or there. Returns the one line that is said."""

    def refused(folder: Path, *arguments: str) -> str:
        def state():
            return {name: (dict(r.branches), dict(r.tags)) for name, r in hub.repositories.items()}

        files, repositories = evaluated.contents(folder), state()
        capsys.readouterr()
        assert main(["publish", str(folder), *arguments]) == 1
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("armt: ")]
        assert out == "" and len(lines) == 1
        assert evaluated.contents(folder) == files
        assert state() == repositories
        return lines[0]

    return refused


class TestPublished:
    def test_is_one_commit(self, hub, published):
        history = hub.repositories[published].history()
        assert [commit.title for _, commit in history] == ["Publish qa1", "initial commit"]

    def test_has_everything(self, hub, published, folder):
        files = set(hub.repositories[published].files())
        code = {path.name for path in folder.glob("*.py")}
        assert len(code) > 20
        assert files == {
            ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json", "results.json", "training.json", "score_by_length.png",
            ".eval_results/babilong.yaml", *code,
        }  # fmt: skip

    def test_files_are_those_of_the_folder(self, hub, published, folder):
        files = hub.repositories[published].files()
        made = {".gitattributes", "README.md", ".eval_results/babilong.yaml", "results.json", "training.json"}
        for name in set(files) - made:
            assert files[name].content == (folder / name).read_bytes(), name

    def test_nothing_tells_where_it_was_made(self, hub, published, folder):
        """Records say what they said, but for the folders of somebody's machine."""
        files = hub.repositories[published].files()
        for name in ("results.json", "training.json"):
            written = json.loads((folder / name).read_text())
            assert "/home/ann" in json.dumps(written)
            assert json.loads(files[name].content) == without_places(written)
        assert not [name for name, blob in files.items() if b"/home/ann" in blob.content]

    def test_card_pins_the_commit(self, hub, published):
        repository = hub.repositories[published]
        tag = re.search(r'"(armt-[0-9a-f]{12})"', repository.files()["README.md"].content.decode())[1]
        assert repository.tags == {tag: repository.branches["main"]}

    def test_card_is_the_folders(self, hub, published):
        card = ModelCard(hub.repositories[published].files()["README.md"].content.decode())
        assert card.data.license == "apache-2.0"
        assert len(card.data.eval_results) == len(evaluated.LENGTHS)
        assert "| chance | 16.7% | 16.7% |" in card.text

    def test_leaderboard_entries_are_this_seeds(self, hub, published):
        entries = yaml.safe_load(hub.repositories[published].files()[".eval_results/babilong.yaml"].content)
        own = evaluated.results()["runs"][0]["lengths"]
        assert [entry["value"] for entry in entries] == [entry["scores"]["memory"]["mean"] for entry in own]
        assert [entry["dataset"]["task_id"] for entry in entries] == ["qa1_0k", "qa1_4k"]
        assert all("not those of the data set" in entry["notes"] for entry in entries)

    def test_was_read_back_by_its_commit(self, hub, published):
        oid = hub.repositories[published].branches["main"]
        assert f"GET /{published}/resolve/{oid}/model.safetensors" in hub.requests
        assert f"GET /{published}/resolve/{oid}/modeling_armt.py" in hub.requests

    def test_example_of_the_card_runs_where_the_package_is_absent(self, hub, published, tmp_path):
        card = hub.repositories[published].files()["README.md"].content.decode()
        code = re.search(r"```python\n(.*?)```", card, flags=re.S)[1]
        absent = f"import sys; sys.path.insert(0, {str(visits.VISITOR.parent)!r}); from visitor import Absent"
        command = [sys.executable, "-P", "-c", f"{absent}\nsys.meta_path.insert(0, Absent)\n{code}"]
        variables = environment(hub, tmp_path, token=None)
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Once upon a time" in result.stdout


class TestRepository:
    """What a commit does to what is there."""

    @pytest.fixture
    def files(self, tmp_path) -> Path:
        files = tmp_path / "prepared"
        (files / ".eval_results").mkdir(parents=True)
        for name in ("README.md", "config.json", "model-00001-of-00002.safetensors", ".eval_results/a.yaml"):
            (files / name).write_bytes(b"{}" if name.endswith("json") else b"---\nlicense: mit\n---\nfirst")
        return files

    def test_replaces_what_publish_once_wrote_and_nothing_else(self, hub, files):
        repository = Repository("ann/again")
        repository.commit(files, "first", "one")
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="demo.ipynb", repo_id="ann/again")
        (files / "model-00001-of-00002.safetensors").rename(files / "model.safetensors")
        (files / ".eval_results" / "a.yaml").unlink()
        oid = repository.commit(files, "second", "two")
        found = hub.repositories["ann/again"]
        assert set(found.files()) == {".gitattributes", "README.md", "config.json", "model.safetensors", "demo.ipynb"}
        assert found.tags["two"] == oid == found.branches["main"]
        assert "model-00001-of-00002.safetensors" in found.files("one")

    def test_branch(self, hub, files):
        Repository("ann/branched").commit(files, "first", "one")
        (files / "config.json").write_text('{"other": 1}')
        oid = Repository("ann/branched", revision="trial").commit(files, "second", "two")
        found = hub.repositories["ann/branched"]
        assert found.branches["trial"] == oid != found.branches["main"]
        assert found.files()["config.json"].content == b"{}"

    @pytest.mark.parametrize("private", [False, True])
    def test_private(self, hub, files, private):
        name = f"ann/private-{private}"
        Repository(name, private=private).commit(files, "first", "one")
        assert hub.repositories[name].private is private

    def test_default_of_the_owner_holds(self, hub, files):
        hub.private_by_default = True
        try:
            Repository("ann/by-default").commit(files, "first", "one")
        finally:
            hub.private_by_default = False
        assert hub.repositories["ann/by-default"].private

    def test_commit_of_somebody_else_meanwhile(self, hub, files):
        repository = Repository("ann/busy")
        repository.commit(files, "first", "one")
        (files / "config.json").write_text('{"other": 1}')
        other = hub.repositories["ann/busy"]

        def meanwhile() -> None:
            hub.faults.clear()
            other.append("main", "theirs", other.files())

        hub.on(r"POST /api/models/ann/busy/preupload", meanwhile)
        with pytest.raises(HubError, match="somebody else has committed"):
            repository.commit(files, "second", "two")
        assert other.history()[0][1].title == "theirs"

    def test_card_that_the_hub_does_not_take(self, hub, files):
        (files / "README.md").write_text("---\nlicense: my-own\n---\n")
        with pytest.raises(HubError, match='does not take this: .*"license" must be one of'):
            Repository("ann/terms").commit(files, "first", "one")
        assert list(hub.repositories["ann/terms"].files()) == [".gitattributes"]

    def test_content_is_not_sent_twice(self, hub, files):
        Repository("ann/twice").commit(files, "first", "one")
        sent = len([request for request in hub.requests if request.startswith("PUT")])
        (files / "config.json").write_text('{"other": 1}')
        Repository("ann/twice").commit(files, "second", "two")
        assert len([request for request in hub.requests if request.startswith("PUT")]) == sent


class TestInterrupted:
    def test_killed_upload_leaves_the_old_revision(self, hub, published, changeable, tmp_path):
        """A real kill, in the middle of the weights."""
        repository = hub.repositories[published]
        before, history = dict(repository.files()), repository.history()
        model = AutoModelForCausalLM.from_pretrained(changeable)
        with torch.no_grad():
            model.memory["0"].memory_value.weight.add_(1)
        model.save_pretrained(changeable)
        evaluated.evaluated(changeable)
        uploading, killed = threading.Event(), threading.Event()

        def hold() -> None:
            uploading.set()
            assert killed.wait(120)

        hub.on(r"PUT /large-files", hold)
        try:
            command = [sys.executable, "-m", "modeling_armt.conversion", "publish", str(changeable), published]
            process = subprocess.Popen(
                # What a killed process leaves behind in the system's temporary folder stays in the test's.
                command,
                env=environment(hub, tmp_path, "hf_ann") | {"TMPDIR": str(tmp_path)},
                stderr=subprocess.PIPE,
                cwd=tmp_path,
            )
            while not uploading.wait(1):
                assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGKILL)
            process.communicate()
        finally:
            killed.set()
            hub.faults.clear()
        assert process.returncode == -signal.SIGKILL
        assert repository.history() == history
        assert repository.files() == before

    def test_connection_that_drops_once_is_tried_again(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
        hub.drop(r"PUT /large-files", times=1)
        try:
            Repository("ann/shaky").commit(tmp_path, "first", "one")
        finally:
            hub.faults.clear()
        assert "model.safetensors" in hub.repositories["ann/shaky"].files()

    @pytest.mark.parametrize("request_", ["PUT /large-files", "POST /api/models/ann/lost/commit"])
    def test_network_that_is_gone(self, hub, tmp_path, monkeypatch, request_):
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        hub.repositories.pop("ann/lost", None)
        hub.large_files.clear()
        save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
        hub.drop(request_, times=100)
        try:
            with pytest.raises(HubError, match="connection to the Hub failed .* shows its old revision"):
                Repository("ann/lost").commit(tmp_path, "first", "one")
        finally:
            hub.faults.clear()
        assert list(hub.repositories["ann/lost"].files()) == [".gitattributes"]

    def test_hub_that_is_out_of_reach(self, hub, monkeypatch, refused, folder):
        with LocalHub() as gone:
            endpoint = gone.endpoint
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        assert "connection to the Hub failed" in refused(folder, "ann/unreachable")

    def test_damaged_upload_is_refused(self, hub):
        """The Hub of these tests checks what it is sent."""
        url = f"{hub.endpoint}/large-files/{'0' * 64}/3"
        assert get_session().put(url, content=b"abc").status_code == 400
        assert get_session().put(url.replace("/3", "/4"), content=b"abc").status_code == 400


class TestRights:
    def test_no_token(self, refused, folder, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        assert "no token for the Hub" in refused(folder, "ann/other")

    def test_token_that_nobody_knows(self, refused, folder, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_eve")
        assert "does not know this token" in refused(folder, "ann/other")

    def test_name_that_is_somebody_elses(self, refused, folder, monkeypatch):
        assert "may not write to ben/qa1" in refused(folder, "ben/qa1")

    def test_repository_that_is_somebody_elses(self, published, refused, folder, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_ben")
        assert "may not write to ann/qa1" in refused(folder, published)

    def test_token_that_may_only_read(self, hub, refused, folder, monkeypatch):
        hub.users["hf_ann_reads"] = "ann"
        hub.readers.add("hf_ann_reads")
        monkeypatch.setenv("HF_TOKEN", "hf_ann_reads")
        assert "may only read" in refused(folder, "ann/other")

    def test_rights_that_end_on_the_way(self, hub, tmp_path):
        """What the Hub refuses later is told in the same words."""
        (tmp_path / "config.json").write_text("{}")
        hub.readers.add("hf_ann")
        try:
            with pytest.raises(HubError, match="may not write to ann/late"):
                Repository("ann/late").commit(tmp_path, "first", "one")
        finally:
            hub.readers.clear()

    def test_private_in_a_public_repository(self, published, refused, folder):
        assert "is public" in refused(folder, published, "--private")
        assert "is public" in refused(folder, published, "--private", "--revision", "a-new-branch")

    def test_public_adapter_on_a_private_base(self, hub, folder):
        HfApi().create_repo("ann/private-base", private=True, exist_ok=True)
        config = ARMTConfig.from_pretrained(folder)
        with pytest.raises(HubError, match="the base ann/private-base is private"):
            Repository("ann/lora-on-it").check(config, "ann/private-base")
        Repository("ann/lora-on-it", private=True).check(config, "ann/private-base")

    @pytest.mark.parametrize("name", ["qa1", "ann/qa1/extra", "ann/my qa1", "https://huggingface.co/ann/qa1"])
    def test_name_that_cannot_be(self, refused, folder, name):
        assert "cannot be a repository" in refused(folder, name)
        assert "cannot be a repository" in refused(folder, name, "--dry-run")

    def test_offline(self, refused, folder, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refused(folder, "ann/other")


class TestOtherContent:
    """A repository that is used for something else is not written over."""

    def fill(self, name: str, **files: str) -> str:
        HfApi().create_repo(name, exist_ok=True)
        for path, content in files.items():
            HfApi().upload_file(
                path_or_fileobj=content.encode(), path_in_repo=path.replace("_json", ".json"), repo_id=name
            )
        return name

    def test_plain_model(self, hub, refused, folder):
        name = self.fill("ann/llama", config_json='{"model_type": "llama"}')
        assert "ann/llama exists and holds something else (config.json" in refused(folder, name)

    def test_new_branch_of_a_plain_model(self, hub, refused, folder):
        """It would be made from `main`, with what is there."""
        name = self.fill("ann/llama-branch", config_json='{"model_type": "llama"}')
        assert "holds something else (config.json" in refused(folder, name, "--revision", "armt")

    def test_adapter(self, hub, refused, folder):
        name = self.fill("ann/adapter", adapter_config_json='{"peft_type": "LORA"}')
        assert "holds something else (adapter_config.json" in refused(folder, name)

    def test_armt_checkpoint_of_another_backbone(self, hub, refused, folder):
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 7
        name = self.fill("ann/larger", config_json=json.dumps(config))
        assert "than an ARMT checkpoint of this shape" in refused(folder, name)

    def test_files_of_no_model(self, hub, refused, folder):
        name = self.fill("ann/thesis", chapters="one")
        assert "holds something else (chapters" in refused(folder, name)


class TestFolders:
    """What is published is whole."""

    def test_whole_folder(self, folder):
        checkpoint = inspect_folder(folder)
        assert checkpoint.adapter is None
        assert checkpoint.left == ["notes.txt"]

    @pytest.mark.parametrize(
        "name",
        ["config.json", "generation_config.json", "model.safetensors", "memory_armt.py", "modeling_armt.py"],
    )
    def test_missing_file(self, refused, changeable, name):
        (changeable / name).unlink()
        assert name in refused(changeable, "ann/incomplete")

    def test_missing_tokenizer(self, refused, changeable):
        for path in changeable.glob("tokenizer*"):
            path.unlink()
        assert "tokenizer" in refused(changeable, "ann/incomplete")

    def test_missing_tokenizer_of_a_model_of_symbols(self, changeable):
        for path in changeable.glob("tokenizer*"):
            path.unlink()
        training = evaluated.training()
        training["recipe"]["task"] = "associative_retrieval"
        evaluated.write(changeable / "training.json", training)
        assert "tokenizer.json" not in inspect_folder(changeable).files

    def test_terms_of_the_backbone_go_along(self, changeable):
        (changeable / "LICENSE.txt").write_text("as the backbone's")
        assert "LICENSE.txt" in inspect_folder(changeable).files

    def test_missing_shard(self, changeable):
        shard(changeable / "model.safetensors", changeable, most_bytes=2**20)
        (changeable / "model.safetensors").unlink()
        assert inspect_folder(changeable)
        next(changeable.glob("model-00002-of-*")).unlink()
        with pytest.raises(FolderError, match="model-00002-of-.* missing"):
            inspect_folder(changeable)

    def test_cut_off_weights(self, refused, changeable):
        weights = changeable / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "model.safetensors is damaged" in refused(changeable, "ann/incomplete")

    def test_weights_that_are_not_all_there(self, refused, changeable):
        """The file is whole, and lacks a memory: transformers would make up random numbers."""
        tensors = load_file(changeable / "model.safetensors")
        del tensors["memory.2.memory_key.weight"]
        save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
        assert "lacks 1 of its weights: memory.2.memory_key.weight" in refused(changeable, "ann/incomplete")

    def test_adapter_in_the_root(self, refused, changeable):
        (changeable / "adapter_config.json").write_text("{}")
        assert "has an adapter (adapter_config.json) beside a full checkpoint" in refused(changeable, "ann/both")

    def test_newer_version(self, refused, changeable):
        config = json.loads((changeable / "config.json").read_text())
        evaluated.write(changeable / "config.json", config | {"armt_version": 99})
        assert "armt_version 99" in refused(changeable, "ann/newer")

    def test_plain_model(self, refused):
        assert "is a plain llama model" in refused(BACKBONE, "ann/plain")

    def test_no_folder(self, hub, capsys):
        assert main(["publish", "no/such", "ann/x"]) == 1
        assert "there is no folder no/such" in capsys.readouterr().err

    def test_results_without_controls(self, refused, changeable):
        results = evaluated.results()
        del results["runs"][0]["lengths"][1]["scores"]["memory swapped"]
        evaluated.write(changeable / "results.json", results)
        assert "memory swapped at 4k of seed 0" in refused(changeable, "ann/no-control")

    def test_bare_backbone_adapter(self, refused, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(BACKBONE)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        assert "a plain llama model: whoever loads it gets that model" in refused(tmp_path / "lora", "ann/lora")

    def test_adapter_whose_base_is_a_folder_of_this_machine(self, refused, folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder)
        get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path / "lora")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "lora")
        said = refused(tmp_path / "lora", "ann/lora")
        assert "a folder of this machine" in said and "--base" in said


class TestDryRun:
    def test_shows_the_files_and_uploads_nothing(self, hub, folder, capsys, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        before, asked = set(hub.repositories), len(hub.requests)
        assert main(["publish", str(folder), "ann/later", "--dry-run"]) == 0
        said, told = capsys.readouterr()
        for name in ("model.safetensors", "README.md", ".eval_results/babilong.yaml", "modeling_armt.py"):
            assert name in said
        assert "left here: notes.txt" in told
        assert set(hub.repositories) == before
        assert len(hub.requests) == asked

    def test_names_of_files_are_no_markup_of_the_terminal(self, changeable, capsys):
        (changeable / "a [bold] [").mkdir()
        (changeable / "a [bold] [" / "bold] b").touch()
        assert main(["publish", str(changeable), "ann/later", "--dry-run"]) == 0
        assert "a [bold] [/bold] b" in capsys.readouterr().err.replace("\n", " ")

    def test_refuses_what_publish_refuses(self, changeable, capsys):
        (changeable / "config.json").unlink()
        assert main(["publish", str(changeable), "ann/later", "--dry-run"]) == 1


class TestShards:
    def test_hold_the_same_tensors(self, folder, tmp_path):
        names = shard(folder / "model.safetensors", tmp_path, most_bytes=2**20)
        assert len(names) > 3
        assert max((tmp_path / name).stat().st_size for name in names) < 2**20 + 4096
        found = {}
        for name in names[:-1]:
            found |= load_file(tmp_path / name)
        expected = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_are_made_of_a_file_that_is_too_large(self, folder, tmp_path):
        prepare(gather(inspect_folder(folder)), tmp_path, most_bytes=2**20)
        assert not (tmp_path / "model.safetensors").exists()
        assert (tmp_path / "config.json").is_symlink()
        found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_load(self, changeable):
        expected = AutoModelForCausalLM.from_pretrained(changeable).state_dict()
        shard(changeable / "model.safetensors", changeable, most_bytes=2**20)
        (changeable / "model.safetensors").unlink()
        found = AutoModelForCausalLM.from_pretrained(changeable).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class TestVisits:
    """The proof can fail."""

    @pytest.mark.parametrize(("change", "same"), [(0.0, True), (1e-6, True), (0.01, False), (float("nan"), False)])
    def test_agreement_is_up_to_rounding(self, change, same):
        logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
        others = logits.clone()
        others[0, 3, 2] += change
        assert visits.agree(logits, others) is same

    def test_other_shape_is_another_model(self):
        assert not visits.agree(torch.zeros(1, 5, 7), torch.zeros(1, 5, 8))

    def test_text_reaches_into_the_second_segment(self, folder):
        config = ARMTConfig.from_pretrained(folder)
        assert config.segment_size < visits.probe(config).shape[1] <= 2 * config.segment_size

    def test_plain_model_is_found_out(self, folder):
        with pytest.raises(visits.VisitError, match="loaded as a plain llama model, without memory"):
            visits.visit(BACKBONE, ARMTConfig.from_pretrained(folder), adapter=False)

    @pytest.mark.slow
    def test_weights_that_give_no_numbers(self, refused, changeable):
        tensors = load_file(changeable / "model.safetensors")
        tensors["memory.2.memory_key.weight"][:] = float("nan")
        save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
        for name in ("results.json", "training.json"):
            (changeable / name).unlink()
        assert "not all finite; nothing was uploaded" in refused(changeable, "ann/nan")

    @pytest.mark.slow
    def test_adapter_on_a_base_that_it_was_not_trained_on(self, hub, folder, tmp_path, refused):
        model = AutoModelForCausalLM.from_pretrained(folder)
        get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path / "lora")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "lora")
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.get_input_embeddings().weight.data.mul_(0.5)
        model.push_to_hub("ann/other-base")
        assert "are different models" in refused(tmp_path / "lora", "ann/lora", "--base", "ann/other-base")


class TestPushToHub:
    """What users of transformers call."""

    def test_model_and_config(self, hub, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.push_to_hub("ann/pushed")
        ARMTConfig.from_pretrained(folder).push_to_hub("ann/config")
        code = {path.name for path in folder.glob("*.py")}
        assert code | {"config.json", "model.safetensors"} <= set(hub.repositories["ann/pushed"].files())
        assert "configuration_armt.py" in hub.repositories["ann/config"].files()
        found = AutoModelForCausalLM.from_pretrained("ann/pushed")
        assert isinstance(found, ARMTForCausalLM)
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_licence_of_a_backbone_on_the_hub_is_linked_from_anywhere(hub):
    """The card of a conversion stands in another repository than the file."""
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    HfApi().create_repo("ann/backbone")
    HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="ann/backbone")
    found = describe_backbone("ann/backbone")
    assert found["license_link"] == "https://huggingface.co/ann/backbone/blob/main/LICENSE"
