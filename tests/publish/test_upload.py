"""`t5g2 upload` and `--push-to`: the real client, in processes of their own, against a Hub on loopback."""

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


def sent(told: dict[str, Any]) -> set[str]:
    return {file["name"] for file in told["files"] if file["sent"]}


@pytest.fixture(params=["lfs", "lfs in parts", "xet"])
def by_each_transport(request: pytest.FixtureRequest, scene: Scene) -> Scene:
    """The scene with a way that large files take."""
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
    told = document(scene, "upload out ann/model")
    repo = scene.hub.repos["ann/model"]
    assert scene.there() == expected
    assert len(repo.commits) == 2, "the Hub's own, and ours"
    assert repo.private_to == {"ann"}
    assert (told["created"], told["private"], told["commit"]) == (True, True, repo.refs["main"])
    assert sent(told) == {*expected, "README.md"}
    ways = {path: len(scene.hub.asked(path, method)) for method, path in WAYS}
    assert [path for path, count in ways.items() if count] == [way_of(scene)]
    assert ways["/lfs-part/"] in {0, 5}
    # Again: nothing is sent, no commit is made.
    scene.hub.log.clear()
    again = document(scene, "upload out ann/model")
    assert (sent(again), again["commit"], again["created"]) == (set(), told["commit"], False)
    assert [request for request in scene.hub.log if request.method not in {"GET", "HEAD"}] == []
    assert "all 7 files are already on the Hub" in scene.good("upload out ann/model --card keep")
    # And it comes back, and is read by its name, by the transport that it was sent by.
    script = "from huggingface_hub import snapshot_download; print(snapshot_download('ann/model'))"
    done = scene.python(["-c", script])
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip())
    assert {path.name: path.read_bytes() for path in snapshot.iterdir() if path.name not in NO_CARD} == expected
    assert document(scene, "inspect ann/model")["hub"]["revision"] == told["commit"]
    # What lies in the cache can be uploaded too: its links are followed.
    assert sent(document(scene, f"upload {snapshot} ann/copy --card keep")) == {*expected, "README.md"}
    assert scene.there("ann/copy") == expected


@pytest.mark.slow
def test_a_branch_is_made_from_main(scene: Scene) -> None:
    main = scene.hub.add("ann/model", scene.folder / "src")
    scene.hub.repos["ann/model"].commits[main].pop("model.safetensors")
    told = document(scene, "upload out ann/model --revision feature/one --public")
    repo = scene.hub.repos["ann/model"]
    assert (repo.refs["main"], told["revision"]) == (main, "feature/one")
    assert scene.there(ref="feature/one").items() >= scene.expected().items()
    assert sent(document(scene, "upload out ann/model --revision feature/one --public")) == set()
    # A new model gets both.
    document(scene, "upload out ann/other --revision dev")
    assert list(scene.hub.repos["ann/other"].files()) == [".gitattributes"]
    assert scene.there("ann/other", "dev") == scene.expected()


def test_what_is_no_branch_is_refused(scene: Scene) -> None:
    sha = scene.hub.add("ann/model", scene.folder / "out")
    scene.hub.repos["ann/model"].tags["v1"] = sha
    assert "v1: it is a tag" in scene.refused("upload out ann/model --revision v1", 2)
    assert f"{sha}: it is a commit" in scene.refused(f"upload out ann/model --revision {sha}", 2)
    told = scene.refused("upload out ann/model --create-pr --revision dev", 2)
    assert "--create-pr or --revision, not both" in told
    for name in ("model", "ann/model/x", "https://user:secret@host/ann/model", "ann/..", "a--b/c"):
        told = scene.refused(f"upload out {name}", 2)
        assert "expected org/name" in told
        assert "secret" not in told


@pytest.mark.slow
def test_a_pull_request_is_made_once(scene: Scene) -> None:
    scene.hub.repos["bo/model"] = Repo()
    main = scene.hub.repos["bo/model"].commit({"README.md": b"---\nlicense: mit\n---\n# Bo's\n"})
    told = document(scene, "upload out bo/model --create-pr --card keep")
    repo = scene.hub.repos["bo/model"]
    assert (told["pull_request"], told["url"]) == (1, f"{scene.hub.url}/bo/model/discussions/1")
    assert repo.refs["main"] == main
    assert scene.there("bo/model", "refs/pr/1") == scene.expected()
    again = document(scene, "upload out bo/model --create-pr --card keep")
    assert (again["pull_request"], sent(again), len(repo.commits)) == (1, set(), 2)
    # One that was closed is none; nor is one with other files.
    repo.pull_requests[0]["status"] = "closed"
    assert document(scene, "upload out bo/model --create-pr --card keep")["pull_request"] == 2
    repo.commit({**repo.files("refs/pr/2"), "config.json": b"{}"}, "refs/pr/2")
    assert document(scene, "upload out bo/model --create-pr --card keep")["pull_request"] == 3
    # An open one can be added to, by who may.
    scene.hub.orgs["ann"] = {"bo"}
    assert sent(document(scene, "upload out bo/model --revision refs/pr/2 --card keep")) == {"config.json"}
    assert scene.there("bo/model", "refs/pr/2") == scene.expected()


@pytest.mark.slow
def test_a_dry_run_tells_and_changes_nothing(scene: Scene) -> None:
    told = document(scene, "upload out ann/model --dry-run")
    assert (told["dry_run"], told["created"], told["commit"]) == (True, True, None)
    assert {file["name"]: file["bytes"] for file in told["files"] if file["name"] != "README.md"} == {
        name: len(data) for name, data in scene.expected().items()
    }
    assert told["bytes"] == sum(file["bytes"] for file in told["files"])
    assert "would be created" in scene.good("upload out ann/model --dry-run")
    assert scene.hub.repos == {}
    document(scene, "upload out ann/model")
    files = scene.hub.repos["ann/model"].files()
    scene.hub.repos["ann/model"].commit({**files, "config.json": b"{}"})
    scene.hub.log.clear()
    assert sent(document(scene, "upload out ann/model --dry-run")) == {"config.json"}
    assert "would send 1 of" in scene.good("upload out ann/model --dry-run --revision dev")
    assert {request.method for request in scene.hub.log} <= {"GET", "HEAD"}


def test_only_what_has_changed_is_sent(scene: Scene) -> None:
    document(scene, "upload out ann/model")
    verify(scene.out, scene.folder / "src")
    scene.hub.log.clear()
    # The card tells of the verification.
    assert sent(document(scene, "upload out ann/model")) == {"README.md", "t5g2.json"}
    assert scene.there() == scene.expected()
    assert scene.hub.asked("/objects/batch|/lfs-put/") == []
    assert sum(request.received for request in scene.hub.log) < 20_000


@pytest.mark.slow
def test_shards_of_an_earlier_upload_do_not_stay_behind(scene: Scene) -> None:
    """transformers would load a model.safetensors in place of the new shards, and the other way round."""
    convert(scene.folder / "src", scene.folder / "sharded", max_shard_bytes=300_000, flush=False)
    document(scene, "upload sharded ann/model")
    shards = [name for name in scene.expected("sharded") if "safetensors" in name]
    assert len(shards) > 3
    files = scene.hub.repos["ann/model"].files()
    scene.hub.repos["ann/model"].commit({**files, "LICENSE": b"mine"})
    told = document(scene, "upload out ann/model --dry-run")
    assert told["removed"] == sorted(shards)
    told = document(scene, "upload out ann/model")
    assert told["removed"] == sorted(shards)
    assert scene.there() == {**scene.expected(), "LICENSE": b"mine"}
    assert len(scene.hub.repos["ann/model"].commits) == 4
    # Weights that are not ours are not removed: it is refused before anything is sent.
    scene.hub.repos["ann/model"].commit({**files, "adapter.safetensors": b"x"})
    scene.hub.log.clear()
    assert "weights of another model, which would be loaded: adapter.safetensors" in scene.refused(
        "upload sharded ann/model"
    )
    assert scene.hub.asked("") == []


def test_a_gitignore_on_the_hub_leaves_nothing_out(scene: Scene) -> None:
    scene.hub.repos["ann/model"] = Repo(private_to={"ann"})
    scene.hub.repos["ann/model"].commit({".gitignore": b"*.json\n*.safetensors\n"})
    document(scene, "upload out ann/model")
    assert scene.there().items() >= scene.expected().items()


@pytest.mark.slow
def test_the_card_that_is_there_is_kept_unless_it_is_to_be_replaced(scene: Scene) -> None:
    theirs = b"---\nlicense: gemma\n---\n# Mine\nwords\n"
    scene.hub.repos["ann/model"] = Repo(private_to={"ann"})
    scene.hub.repos["ann/model"].commit({"README.md": theirs})
    document(scene, "upload out ann/model --card keep")
    assert scene.hub.repos["ann/model"].files()["README.md"] == theirs
    document(scene, "upload out ann/model")
    assert b"words" in scene.hub.repos["ann/model"].files()["README.md"]
    told = document(scene, "upload out ann/model --card replace")
    assert sent(told) == {"README.md"}
    assert b"words" not in scene.hub.repos["ann/model"].files()["README.md"]
    assert sent(document(scene, "upload out ann/model --card replace")) == set()
    assert "update" in scene.refused("upload out ann/model --card mine", 2)
    scene.hub.repos["ann/model"].commit({"README.md": b"\xff\xfe"})
    assert "README.md is not UTF-8 (use --card replace" in scene.refused("upload out ann/model")
    document(scene, "upload out ann/model --card keep")


def test_the_card_of_the_folder_is_sent_where_there_is_none(scene: Scene) -> None:
    (scene.out / "README.md").write_text("---\nlicense: mit\n---\n# Written here\n")
    document(scene, "upload out ann/model --card keep")
    assert scene.hub.repos["ann/model"].files()["README.md"] == (scene.out / "README.md").read_bytes()
    (scene.out / "README.md").write_text("changed")
    told = document(scene, "upload out ann/model --card keep")
    assert sent(told) == set()
    assert any("README.md in the folder is not sent" in note for note in told["notes"])


def test_metadata_that_the_hub_refuses_are_told(scene: Scene) -> None:
    (scene.out / "README.md").write_text("---\nlicense: [\n---\n# Written here\n")
    told = scene.refused("upload out ann/model --card keep")
    assert "the Hub rejected the metadata of README.md" in told
    assert list(scene.hub.repos["ann/model"].files()) == [".gitattributes"]
    (scene.out / "README.md").write_text("no metadata")
    notes = document(scene, "upload out ann/model --card keep")["notes"]
    assert any("empty or missing yaml metadata" in note for note in notes)


@pytest.mark.slow
def test_a_model_that_is_there_stays_public_or_private(scene: Scene) -> None:
    scene.hub.add("ann/model", scene.out)
    done = scene.run("upload out ann/model --card keep")
    assert done.stderr == "note: ann/model is already public, and stays public\n"
    assert scene.run("upload out ann/model --card keep --public").stderr == ""
    document(scene, "upload out ann/closed")
    assert "stays private: --public is for new models" in scene.run("upload out ann/closed --public").stderr
    assert scene.hub.repos["ann/closed"].private_to is not None
    assert document(scene, "upload out ann/open --public")["private"] is False
    assert scene.hub.repos["ann/open"].private_to is None


def test_an_organizations_model_is_made_by_its_members(scene: Scene) -> None:
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
def test_a_conversion_is_pushed_after_it_was_judged(scene: Scene) -> None:
    told = document(scene, "convert src new --verify --push-to ann/new --no-flush")
    assert told["verification"]["passed"]
    assert sent(told["upload"]) == {*scene.expected("new"), "README.md"}
    assert scene.there("ann/new") == scene.expected("new")
    assert json.loads(scene.there("ann/new")["t5g2.json"])["verification"]["passed"]
    told = document(scene, "extract new gemma --part decoder --push-to ann/gemma")
    assert scene.there("ann/gemma") == scene.expected("gemma")
    printed = scene.good("extract new encoder --part encoder --push-to ann/encoder")
    assert "sent 7 of 7 files" in printed
    assert scene.there("ann/encoder") == scene.expected("encoder")


@pytest.mark.slow
def test_the_card_knows_the_models_of_the_hub_that_a_folder_was_made_of(scene: Scene) -> None:
    shutil.copytree(scene.folder / "src", scene.folder / "source")
    (scene.folder / "source/README.md").write_text("---\nlicense: gemma\n---\n")
    scene.hub.add("google/gemma-demo", scene.folder / "source", gated_to={"ann"})
    document(scene, "convert google/gemma-demo new --push-to ann/new --no-flush")
    made = scene.hub.repos["ann/new"].files()["README.md"]
    assert b"base_model: google/gemma-demo\n" in made
    assert b"license: gemma\n" in made
    # The card of a source that was a folder is to be given again.
    document(scene, "convert source local --push-to ann/local --no-flush")
    assert b"license: gemma\n" in scene.hub.repos["ann/local"].files()["README.md"]
    assert sent(document(scene, "upload local ann/local --source-card source/README.md")) == set()
    assert "source/none" in scene.refused("upload local ann/local --source-card source/none", 3)
    # Who may not see the source's card is told that its license is not known.
    scene.hub.users["hf_bo"] = "bo"
    done = scene.run("upload new bo/new", HF_TOKEN="hf_bo", HF_HOME=str(scene.folder / "other"))
    assert done.returncode == 0, done.stderr
    assert "note: the card of google/gemma-demo is not available" in done.stderr


def test_a_model_that_was_trained_further_is_sent_with_its_card(scene: Scene, kinds: Path) -> None:
    shutil.rmtree(scene.out)
    shutil.copytree(kinds / "adapted", scene.out)
    expected = scene.expected()
    told = document(scene, "upload out ann/model")
    assert scene.there() == expected
    assert sent(told) == {*expected, "README.md"}
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
    told = document(scene, "upload first ann/model")
    assert {"additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"} <= sent(told)
    assert scene.there()["additional_chat_templates/rag.jinja"] == b"{{ documents }}"
    assert sent(document(scene, "upload first ann/model")) == set()
    # And it is read by its name: extracted with its templates, which are fetched.
    scene.good("extract ann/model decoder --part decoder")
    assert (scene.folder / "decoder/additional_chat_templates/rag.jinja").read_text() == "{{ documents }}"
    # One that is gone from the source goes; a stranger beside it stays, as any stranger does.
    (templates / "rag.jinja").unlink()
    convert(source, scene.folder / "second", flush=False)
    scene.good("upload second ann/model")
    there = scene.there()
    assert "additional_chat_templates/rag.jinja" not in there
    assert there["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
