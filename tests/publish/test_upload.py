"""`t5g2 upload` and `--push-to`: the real client in separate processes, against a Hub on loopback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import convert
from t5g2convert.parity.verify import verify
from tests.hub.server import Repo
from tests.publish.scene import Scene

NO_CARD = {"README.md", ".gitattributes"}


WAYS = (("PUT", "/lfs-put/"), ("PUT", "/lfs-part/"), ("GET", "/xet-write-token/"))


def way_of(scene: Scene) -> str:
    if scene.hub.xet_store is not None:
        return "/xet-write-token/"
    return "/lfs-put/" if scene.hub.part_bytes is None else "/lfs-part/"


def document(scene: Scene, line: str, **env: str) -> dict[str, Any]:
    return dict(json.loads(scene.good(f"{line} --json", **env)))


def sent(result: dict[str, Any]) -> set[str]:
    return {file["name"] for file in result["files"] if file["sent"]}


@pytest.fixture(params=["lfs", "lfs in parts", "xet"])
def by_each_transport(request: pytest.FixtureRequest, scene: Scene) -> Scene:
    """Return the scene with each transport for large files."""
    if request.param == "lfs in parts":
        scene.hub.part_bytes = 200_000
    if request.param == "xet":
        scene.hub.xet_store = scene.folder.parent / "store"
        scene.hub.xet_store.mkdir()
        scene.settings["HF_HUB_DISABLE_XET"] = "0"
    return scene


@pytest.mark.slow
def test_H5_an_upload_is_one_commit_of_the_manifests_files_by_either_transport(
    by_each_transport: Scene,
) -> None:
    scene = by_each_transport
    expected = scene.expected()
    for stray in (".env", "notes.txt", "model.safetensors.tmp", "optimizer.pt"):
        (scene.out / stray).write_bytes(b"mine")
    result = document(scene, "upload out ann/model")
    repo = scene.hub.repos["ann/model"]
    assert scene.there() == expected
    assert len(repo.commits) == 2, "the Hub's own, and ours"
    assert repo.private_to == {"ann"}
    assert (result["created"], result["private"], result["commit"]) == (True, True, repo.refs["main"])
    assert sent(result) == {*expected, "README.md"}
    ways = {path: len(scene.hub.requests_to(path, method)) for method, path in WAYS}
    assert [path for path, count in ways.items() if count] == [way_of(scene)]
    assert ways["/lfs-part/"] in {0, 5}
    # Uploading again sends nothing and makes no commit.
    scene.hub.log.clear()
    again = document(scene, "upload out ann/model")
    assert (sent(again), again["commit"], again["created"]) == (set(), result["commit"], False)
    assert [request for request in scene.hub.log if request.method not in {"GET", "HEAD"}] == []
    assert "all 7 files are already on the Hub" in scene.good("upload out ann/model --card keep")
    # It can be downloaded and read by name, with the same transport.
    script = "from huggingface_hub import snapshot_download; print(snapshot_download('ann/model'))"
    done = scene.python(["-c", script])
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert {path.name: path.read_bytes() for path in snapshot.iterdir() if path.name not in NO_CARD} == expected
    assert document(scene, "inspect ann/model")["hub"]["revision"] == result["commit"]
    # A folder in the cache can be uploaded too: its links are followed.
    assert sent(document(scene, f"upload {snapshot} ann/copy --card keep")) == {*expected, "README.md"}
    assert scene.there("ann/copy") == expected


@pytest.mark.slow
def test_a_branch_is_made_from_main(scene: Scene) -> None:
    main = scene.hub.add("ann/model", scene.folder / "src")
    scene.hub.repos["ann/model"].commits[main].pop("model.safetensors")
    result = document(scene, "upload out ann/model --revision feature/one --public")
    repo = scene.hub.repos["ann/model"]
    assert (repo.refs["main"], result["revision"]) == (main, "feature/one")
    assert scene.there(ref="feature/one").items() >= scene.expected().items()
    assert sent(document(scene, "upload out ann/model --revision feature/one --public")) == set()
    # A new model gets both.
    document(scene, "upload out ann/other --revision dev")
    assert list(scene.hub.repos["ann/other"].files()) == [".gitattributes"]
    assert scene.there("ann/other", "dev") == scene.expected()


def test_an_invalid_branch_is_refused(scene: Scene) -> None:
    sha = scene.hub.add("ann/model", scene.folder / "out")
    scene.hub.repos["ann/model"].tags["v1"] = sha
    assert "v1: it is a tag" in scene.refused("upload out ann/model --revision v1", 2)
    assert f"{sha}: it is a commit" in scene.refused(f"upload out ann/model --revision {sha}", 2)
    message = scene.refused("upload out ann/model --create-pr --revision dev", 2)
    assert "--create-pr or --revision, not both" in message
    for name in ("model", "ann/model/x", "https://user:secret@host/ann/model", "ann/..", "a--b/c"):
        message = scene.refused(f"upload out {name}", 2)
        assert "expected org/name" in message
        assert "secret" not in message


@pytest.mark.slow
def test_a_pull_request_is_opened_once(scene: Scene) -> None:
    scene.hub.repos["bo/model"] = Repo()
    main = scene.hub.repos["bo/model"].commit({"README.md": b"---\nlicense: mit\n---\n# Bo's\n"})
    result = document(scene, "upload out bo/model --create-pr --card keep")
    repo = scene.hub.repos["bo/model"]
    assert (result["pull_request"], result["url"]) == (1, f"{scene.hub.url}/bo/model/discussions/1")
    assert repo.refs["main"] == main
    assert scene.there("bo/model", "refs/pr/1") == scene.expected()
    again = document(scene, "upload out bo/model --create-pr --card keep")
    assert (again["pull_request"], sent(again), len(repo.commits)) == (1, set(), 2)
    # Closed pull requests and those with other files do not count.
    repo.pull_requests[0]["status"] = "closed"
    assert document(scene, "upload out bo/model --create-pr --card keep")["pull_request"] == 2
    repo.commit({**repo.files("refs/pr/2"), "config.json": b"{}"}, "refs/pr/2")
    assert document(scene, "upload out bo/model --create-pr --card keep")["pull_request"] == 3
    # A user with access can add to an open one.
    scene.hub.orgs["ann"] = {"bo"}
    assert sent(document(scene, "upload out bo/model --revision refs/pr/2 --card keep")) == {"config.json"}
    assert scene.there("bo/model", "refs/pr/2") == scene.expected()


@pytest.mark.slow
def test_a_dry_run_reports_and_changes_nothing(scene: Scene) -> None:
    result = document(scene, "upload out ann/model --dry-run")
    assert (result["dry_run"], result["created"], result["commit"]) == (True, True, None)
    assert {file["name"]: file["bytes"] for file in result["files"] if file["name"] != "README.md"} == {
        name: len(data) for name, data in scene.expected().items()
    }
    assert result["bytes"] == sum(file["bytes"] for file in result["files"])
    assert "would be created" in scene.good("upload out ann/model --dry-run")
    assert scene.hub.repos == {}
    document(scene, "upload out ann/model")
    files = scene.hub.repos["ann/model"].files()
    scene.hub.repos["ann/model"].commit({**files, "config.json": b"{}"})
    scene.hub.log.clear()
    assert sent(document(scene, "upload out ann/model --dry-run")) == {"config.json"}
    assert "would send 1 of" in scene.good("upload out ann/model --dry-run --revision dev")
    assert {request.method for request in scene.hub.log} <= {"GET", "HEAD"}


def test_only_changed_files_are_sent(scene: Scene) -> None:
    document(scene, "upload out ann/model")
    verify(scene.out, scene.folder / "src")
    scene.hub.log.clear()
    # The card reports the verification.
    assert sent(document(scene, "upload out ann/model")) == {"README.md", "t5g2.json"}
    assert scene.there() == scene.expected()
    assert scene.hub.requests_to("/objects/batch|/lfs-put/") == []
    assert sum(request.received for request in scene.hub.log) < 20_000


@pytest.mark.slow
def test_shards_of_an_earlier_upload_do_not_stay_behind(scene: Scene) -> None:
    """transformers would load an old model.safetensors instead of the new shards, and vice versa."""
    convert(scene.folder / "src", scene.folder / "sharded", max_shard_bytes=300_000, flush=False)
    document(scene, "upload sharded ann/model")
    shards = [name for name in scene.expected("sharded") if "safetensors" in name]
    assert len(shards) > 3
    files = scene.hub.repos["ann/model"].files()
    scene.hub.repos["ann/model"].commit({**files, "LICENSE": b"mine"})
    result = document(scene, "upload out ann/model --dry-run")
    assert result["removed"] == sorted(shards)
    result = document(scene, "upload out ann/model")
    assert result["removed"] == sorted(shards)
    assert scene.there() == {**scene.expected(), "LICENSE": b"mine"}
    assert len(scene.hub.repos["ann/model"].commits) == 4
    # Weights that are not ours are not removed: the upload is refused before anything is sent.
    scene.hub.repos["ann/model"].commit({**files, "adapter.safetensors": b"x"})
    scene.hub.log.clear()
    assert "weights of another model, which would be loaded: adapter.safetensors" in scene.refused(
        "upload sharded ann/model"
    )
    assert scene.hub.requests_to("") == []


def test_a_gitignore_on_the_hub_leaves_nothing_out(scene: Scene) -> None:
    scene.hub.repos["ann/model"] = Repo(private_to={"ann"})
    scene.hub.repos["ann/model"].commit({".gitignore": b"*.json\n*.safetensors\n"})
    document(scene, "upload out ann/model")
    assert scene.there().items() >= scene.expected().items()


@pytest.mark.slow
def test_an_existing_card_is_kept_unless_replaced(scene: Scene) -> None:
    theirs = b"---\nlicense: gemma\n---\n# Mine\nwords\n"
    scene.hub.repos["ann/model"] = Repo(private_to={"ann"})
    scene.hub.repos["ann/model"].commit({"README.md": theirs})
    document(scene, "upload out ann/model --card keep")
    assert scene.hub.repos["ann/model"].files()["README.md"] == theirs
    document(scene, "upload out ann/model")
    assert b"words" in scene.hub.repos["ann/model"].files()["README.md"]
    result = document(scene, "upload out ann/model --card replace")
    assert sent(result) == {"README.md"}
    assert b"words" not in scene.hub.repos["ann/model"].files()["README.md"]
    assert sent(document(scene, "upload out ann/model --card replace")) == set()
    assert "update" in scene.refused("upload out ann/model --card mine", 2)
    scene.hub.repos["ann/model"].commit({"README.md": b"\xff\xfe"})
    assert "README.md is not UTF-8 (use --card replace" in scene.refused("upload out ann/model")
    document(scene, "upload out ann/model --card keep")


def test_the_folders_card_is_sent_if_the_hub_has_none(scene: Scene) -> None:
    (scene.out / "README.md").write_text("---\nlicense: mit\n---\n# Written here\n")
    document(scene, "upload out ann/model --card keep")
    assert scene.hub.repos["ann/model"].files()["README.md"] == (scene.out / "README.md").read_bytes()
    (scene.out / "README.md").write_text("changed")
    result = document(scene, "upload out ann/model --card keep")
    assert sent(result) == set()
    assert any("README.md in the folder is not sent" in note for note in result["notes"])


def test_metadata_that_the_hub_refuses_is_reported(scene: Scene) -> None:
    (scene.out / "README.md").write_text("---\nlicense: [\n---\n# Written here\n")
    message = scene.refused("upload out ann/model --card keep")
    assert "the Hub rejected the metadata of README.md" in message
    assert list(scene.hub.repos["ann/model"].files()) == [".gitattributes"]
    (scene.out / "README.md").write_text("no metadata")
    notes = document(scene, "upload out ann/model --card keep")["notes"]
    assert any("empty or missing yaml metadata" in note for note in notes)


@pytest.mark.slow
def test_an_existing_model_stays_public_or_private(scene: Scene) -> None:
    scene.hub.add("ann/model", scene.out)
    done = scene.run("upload out ann/model --card keep")
    assert done.stderr == "note: ann/model is already public, and stays public\n"
    assert scene.run("upload out ann/model --card keep --public").stderr == ""
    document(scene, "upload out ann/closed")
    assert "stays private: --public is for new models" in scene.run("upload out ann/closed --public").stderr
    assert scene.hub.repos["ann/closed"].private_to is not None
    assert document(scene, "upload out ann/open --public")["private"] is False
    assert scene.hub.repos["ann/open"].private_to is None


def test_an_organizations_model_is_created_by_its_members(scene: Scene) -> None:
    scene.hub.orgs["ann"] = {"lab"}
    scene.hub.users["hf_other"] = "bo"
    scene.hub.orgs["bo"] = {"lab"}
    document(scene, "upload out lab/model")
    assert scene.hub.repos["lab/model"].private_to == {"ann", "bo"}


def test_a_damaged_folder_is_refused_before_anything_is_made(scene: Scene) -> None:
    data = (scene.out / "model.safetensors").read_bytes()
    (scene.out / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = scene.run("upload out ann/model")
    assert done.returncode == 3
    assert done.stderr.splitlines()[1:] == ["  model.safetensors has the wrong sha256"]
    assert "nothing was sent" in done.stderr
    assert scene.hub.repos == {}


@pytest.mark.slow
def test_a_conversion_is_pushed_after_verification(scene: Scene) -> None:
    result = document(scene, "convert src new --verify --push-to ann/new --no-flush")
    assert result["verification"]["passed"]
    assert sent(result["upload"]) == {*scene.expected("new"), "README.md"}
    assert scene.there("ann/new") == scene.expected("new")
    assert json.loads(scene.there("ann/new")["t5g2.json"])["verification"]["passed"]
    result = document(scene, "extract new gemma --part decoder --push-to ann/gemma")
    assert scene.there("ann/gemma") == scene.expected("gemma")
    printed = scene.good("extract new encoder --part encoder --push-to ann/encoder")
    assert "sent 7 of 7 files" in printed
    assert scene.there("ann/encoder") == scene.expected("encoder")


@pytest.mark.slow
def test_the_card_names_the_hub_models_that_a_folder_was_made_from(scene: Scene) -> None:
    shutil.copytree(scene.folder / "src", scene.folder / "source")
    (scene.folder / "source/README.md").write_text("---\nlicense: gemma\n---\n")
    scene.hub.add("google/gemma-demo", scene.folder / "source", gated_to={"ann"})
    document(scene, "convert google/gemma-demo new --push-to ann/new --no-flush")
    made = scene.hub.repos["ann/new"].files()["README.md"]
    assert b"base_model: google/gemma-demo\n" in made
    assert b"license: gemma\n" in made
    # The card of a source folder must be passed again.
    document(scene, "convert source local --push-to ann/local --no-flush")
    assert b"license: gemma\n" in scene.hub.repos["ann/local"].files()["README.md"]
    assert sent(document(scene, "upload local ann/local --source-card source/README.md")) == set()
    assert "source/none" in scene.refused("upload local ann/local --source-card source/none", 3)
    # A user without access to the source card gets a note that its license is unknown.
    scene.hub.users["hf_bo"] = "bo"
    done = scene.run("upload new bo/new", HF_TOKEN="hf_bo", HF_HOME=str(scene.folder / "other"))
    assert done.returncode == 0, done.stderr
    assert "note: the card of google/gemma-demo is not available" in done.stderr


def test_a_model_that_was_trained_further_is_sent_with_its_card(scene: Scene, kinds: Path) -> None:
    shutil.rmtree(scene.out)
    shutil.copytree(kinds / "adapted", scene.out)
    expected = scene.expected()
    result = document(scene, "upload out ann/model")
    assert scene.there() == expected
    assert sent(result) == {*expected, "README.md"}
    assert (
        b"T5Gemma 2 encoder-decoder that was converted from Gemma 3 and **trained further**"
        in (scene.hub.repos["ann/model"].files("main")["README.md"])
    )


@pytest.mark.slow
def test_further_chat_templates_are_sent_and_removed_with_the_folder_that_they_are_in(scene: Scene) -> None:
    source = shutil.copytree(scene.folder / "src", scene.folder / "with-templates")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ documents }}")
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    convert(source, scene.folder / "first", flush=False)
    result = document(scene, "upload first ann/model")
    assert {"additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"} <= sent(result)
    assert scene.there()["additional_chat_templates/rag.jinja"] == b"{{ documents }}"
    assert sent(document(scene, "upload first ann/model")) == set()
    # It is read by its name: extracted with its fetched templates.
    scene.good("extract ann/model decoder --part decoder")
    assert (scene.folder / "decoder/additional_chat_templates/rag.jinja").read_text() == "{{ documents }}"
    # A template removed from the source is removed; an unrelated file next to it stays.
    (templates / "rag.jinja").unlink()
    convert(source, scene.folder / "second", flush=False)
    scene.good("upload second ann/model")
    there = scene.there()
    assert "additional_chat_templates/rag.jinja" not in there
    assert there["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
