"""`armt refresh`: this version's code in a checkpoint that has another's, here and on a Hub on this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import evaluated
import pytest
from huggingface_hub import HfApi
from local_hub import LocalHub, connected
from peft import LoraConfig

from modeling_armt import version_armt
from modeling_armt.configuration_armt import ARMT_VERSION
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.publishing import releases
from modeling_armt.version_armt import code_version


SHIPPED = {path.name: path.read_bytes() for path in version_armt.code_files()}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A checkpoint with memories that matter and a file of its owner's, as this version saves it."""
    folder = tmp_path_factory.mktemp("refresh") / "armt"
    evaluated.checkpoint(folder)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def fresh(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "armt"))


def change(folder: Path, line: str) -> None:
    """Another code: `line` is at the end of a file, and there is a file that this version does not have."""
    (folder / "older_armt.py").write_text("")
    path = folder / "head_armt.py"
    path.write_text(f"from .older_armt import *\n{path.read_text()}\n{line}\n")
    config = json.loads((folder / "config.json").read_text())
    del config["code_version"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def old(fresh: Path, monkeypatch) -> Path:
    """A checkpoint with released code that newer libraries cannot run any more."""
    change(fresh, "raise ImportError('renamed')")
    monkeypatch.setitem(releases.RELEASED, "0.0.9", f"123456789abc {code_version(fresh)}")
    return fresh


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs what has to fail; nothing may change in the folder, nor beside it. Returns the one line that is said."""

    def refused(folder: Path, *options: str) -> str:
        before = evaluated.contents(folder.parent)
        assert main(["refresh", str(folder), *options]) == 1
        assert evaluated.contents(folder.parent) == before
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def code(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def test_code_of_this_version_is_known():
    assert releases.is_ours(code_version())
    assert not releases.is_ours("0" * 12)


class TestFolder:
    def test_old_code_is_replaced_and_nothing_else(self, old, capsys):
        before, version = evaluated.contents(old), code_version(old)
        inode = (old / "model.safetensors").stat().st_ino
        assert main(["refresh", str(old)]) == 0
        assert code(old) == SHIPPED
        assert (old / "model.safetensors").stat().st_ino == inode
        after = evaluated.contents(old)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        assert changed == {"config.json", "older_armt.py", "head_armt.py"}
        config = json.loads((old / "config.json").read_text())
        assert config == json.loads(before["config.json"]) | {"code_version": code_version()}
        assert [path.name for path in old.parent.iterdir()] == ["armt"]
        said = " ".join(capsys.readouterr().err.split())
        assert f"has the code of version {code_version()}; before it had {version}" in said

    def test_code_of_this_version_stays(self, fresh, capsys):
        before = evaluated.contents(fresh)
        assert main(["refresh", str(fresh)]) == 0
        assert evaluated.contents(fresh) == before
        assert "has this version's code already" in " ".join(capsys.readouterr().err.split())

    def test_code_that_somebody_changed_needs_force(self, fresh, refused):
        change(fresh, "def mine(): ...")
        message = refused(fresh)
        assert f"{fresh} ({code_version(fresh)}) equals no released version of ours" in message
        assert "--force" in message

    def test_classes_of_somebody_elses_need_force(self, fresh, refused):
        config = json.loads((fresh / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "mine.Mine"
        (fresh / "config.json").write_text(json.dumps(config))
        assert "somebody has changed it" in refused(fresh)

    def test_other_logits_need_force(self, fresh, refused, monkeypatch):
        change(fresh, "_run = run_head\ndef run_head(*args): return _run(*args) * 2")
        monkeypatch.setitem(releases.RELEASED, "0.0.9", code_version(fresh))
        assert "gives other logits with this version of the code than with its own" in refused(fresh)
        assert main(["refresh", str(fresh), "--force"]) == 0
        assert code(fresh) == SHIPPED

    def test_adapter_has_no_code_and_names_its_base(self, tmp_path, refused):
        folder = tmp_path / "adapter"
        LoraConfig(base_model_name_or_path="ann/armt", revision="1234").save_pretrained(folder)
        assert "is an adapter, which has no code" in (message := refused(folder))
        assert "armt refresh ann/armt, and publish the adapter again: it pins the base at 1234" in message

    def test_plain_model(self, fresh, refused):
        (fresh / "config.json").write_text('{"model_type": "llama"}')
        assert "is a plain llama model, not an ARMT checkpoint" in refused(fresh)

    def test_newer_format(self, fresh, refused):
        config = json.loads((fresh / "config.json").read_text())
        (fresh / "config.json").write_text(json.dumps(config | {"armt_version": ARMT_VERSION + 1}))
        assert f"armt_version {ARMT_VERSION + 1}" in refused(fresh)

    def test_current_folder(self, old, refused, monkeypatch):
        monkeypatch.chdir(old)
        assert "change to another folder" in refused(old)

    def test_run_that_was_killed_between_the_two_renames_is_undone(self, fresh):
        before = evaluated.contents(fresh)
        fresh.rename(fresh.with_name(".armt.before"))
        assert main(["refresh", str(fresh)]) == 0
        assert evaluated.contents(fresh) == before
        shutil.copytree(fresh, fresh.with_name(".armt.before"))  # killed after them
        assert main(["refresh", str(fresh)]) == 0
        assert [path.name for path in fresh.parent.iterdir()] == ["armt"]


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path_factory) -> Iterator[LocalHub]:
        with LocalHub(ann="hf_ann", ben="hf_ben") as hub, connected(hub, tmp_path_factory.mktemp("hub"), "hf_ann"):
            yield hub

    @pytest.fixture
    def repository(self, hub, old) -> str:
        """Old code on the Hub, with a card that pins its commit."""
        (old / "README.md").write_text("---\nlicense: mit\n---\nrevision = 'armt-0123456789ab'\n")
        HfApi().create_repo("ann/armt")
        HfApi().upload_folder(repo_id="ann/armt", folder_path=old)
        HfApi().create_tag("ann/armt", tag="armt-0123456789ab")
        return "ann/armt"

    def test_old_code_is_replaced_in_one_commit(self, hub, repository, old, capsys):
        found = hub.repositories[repository]
        before, history, requests = dict(found.files()), found.history(), len(hub.requests)
        assert main(["refresh", repository]) == 0
        after = found.files()
        assert found.history()[1:] == history
        assert {name: blob.content for name, blob in after.items() if name.endswith(".py")} == SHIPPED
        changed = {name for name in before | after if name not in after or before[name].content != after[name].content}
        assert changed == {"config.json", "older_armt.py", "head_armt.py", "README.md"}
        tags = {tag: oid for tag, oid in found.tags.items() if tag != "armt-0123456789ab"}
        assert list(tags.values()) == [found.branches["main"]]
        assert after["README.md"].content.decode().endswith(f"revision = '{next(iter(tags))}'\n")
        assert not [request for request in hub.requests[requests:] if request.startswith("PUT")]
        assert f"GET /ann/armt/resolve/{found.branches['main']}/modeling_armt.py" in hub.requests
        assert found.branches["main"] in capsys.readouterr().err.replace("\n", "")
        assert main(["refresh", repository]) == 0
        assert found.history()[1:] == history

    def test_rights_are_asked_for_first(self, hub, repository, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "hf_ben")
        history = hub.repositories[repository].history()
        assert main(["refresh", repository]) == 1
        assert "may not write to ann/armt" in capsys.readouterr().err
        assert hub.repositories[repository].history() == history

    def test_nothing_of_that_name(self, hub, capsys):
        assert main(["refresh", "ann/nothing"]) == 1
        assert "there is no checkpoint ann/nothing, neither a path here nor" in capsys.readouterr().err
