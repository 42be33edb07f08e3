"""Commands on Hub models: the real client in separate processes, against a Hub on loopback."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import convert, plan
from t5g2convert.checkpoint.file_names import SINGLE_FILE
from t5g2convert.checkpoint.hub.range_requests import FIRST_BYTES
from t5g2convert.checkpoint.hub.snapshot import SMALL_BYTES
from t5g2convert.checkpoint.manifest import seal
from tests.conftest import TwinFolder
from tests.folders import contents
from tests.hub.server import Fault, Hub, running
from tests.processes.forked import run_t5g2

REPO: Final = "google/gemma-demo"
TOKEN: Final = "hf_thetokenofthecommandline"


@dataclass
class Scene:
    """A Hub, and a work folder with its own cache."""

    hub: Hub
    folder: Path

    def __call__(self, line: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run_t5g2(*line.split(), cwd=self.folder, env={**self.hub.env(self.folder / "home"), **env})

    def json(self, line: str, **env: str) -> dict[str, Any]:
        """Return the document of a successful command."""
        done = self(f"{line} --json", **env)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with running() as hub:
        (tmp_path / "work").mkdir()
        yield Scene(hub, tmp_path / "work")


def without_hub(manifest: bytes) -> dict[str, Any]:
    """Return a manifest without the fields that only a Hub conversion has."""
    document = json.loads(manifest)
    del document["sha256"]
    for role in ("source", "decoder_from", "vision_from"):
        document.get(role, {}).pop("hub", None)
    return dict(document)


@pytest.mark.slow
def test_headers_are_all_that_inspect_and_plan_read(scene: Scene, demo_source: Path) -> None:
    sha = scene.hub.add(REPO, demo_source)
    found = scene.json(f"inspect {REPO}")
    assert found["hub"] == {"repo": REPO, "revision": sha}
    here = scene.json(f"inspect {demo_source}")
    assert "hub" not in here
    assert {**here, "path": "", "hub": ""} == {**found, "path": "", "hub": ""}
    planned = scene.json(f"plan {REPO}@main")
    assert planned["hub"] == found["hub"]
    assert planned["download"] == (demo_source / SINGLE_FILE).stat().st_size
    assert planned["tensors"] == plan(demo_source).to_json()["tensors"]
    assert planned["files"] == plan(demo_source).to_json()["files"]
    assert scene.json(f"mappings check gemma3 --against {REPO}")["tensors"] == len(planned["tensors"])
    assert scene.hub.sent(SINGLE_FILE) == 3 * FIRST_BYTES
    assert not list((scene.folder / "home").rglob(SINGLE_FILE))
    result = scene(f"inspect {REPO}")
    assert f"gemma3 in {REPO}@{sha}" in result.stdout
    assert result.stderr == ""
    shown = scene(f"plan {REPO}").stdout
    assert f"{REPO}: gemma3 to t5gemma2" in shown
    assert "of memory; downloads " in shown


def test_a_large_tokenizer_config_is_fetched_and_carried(scene: Scene, demo_source: Path) -> None:
    path = demo_source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "x" * (SMALL_BYTES + 1)}))
    scene.hub.add(REPO, demo_source)
    made = scene.json(f"plan {REPO}")
    assert made["files"] == plan(demo_source).to_json()["files"]
    assert made["notes"] == list(plan(demo_source).notes)
    scene.json(f"convert {REPO} out --no-flush --no-verify --no-card")
    convert(demo_source, scene.folder / "expected", flush=False)
    assert contents(scene.folder / "out").keys() == contents(scene.folder / "expected").keys()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (scene.folder / "out" / name).read_bytes() == (scene.folder / "expected" / name).read_bytes()


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["images-sharded", "text-8"])
def test_a_conversion_equals_that_of_the_same_files(scene: Scene, twin_folder: TwinFolder, name: str) -> None:
    source = twin_folder(name)
    sha = scene.hub.add(REPO, source)
    done = scene(f"convert {REPO} out --no-flush --verify --no-card")
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert not [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    convert(source, scene.folder / "expected", flush=False)
    found, expected = contents(scene.folder / "out"), contents(scene.folder / "expected")
    manifests = found.pop("t5g2.json"), expected.pop("t5g2.json")
    assert found == expected
    assert json.loads(manifests[0])["source"]["hub"] == {"repo": REPO, "revision": sha}
    manifest = without_hub(manifests[0])
    assert manifest.pop("verification")["passed"]
    assert manifest == without_hub(manifests[1])


def test_an_offline_conversion_equals_the_online_one_byte_for_byte(scene: Scene, demo_source: Path) -> None:
    scene.hub.add(REPO, demo_source)
    assert scene.json(f"convert {REPO} online --no-verify --no-card")["tensors"] > 200
    scene.hub.log.clear()
    for command in ("inspect", "plan"):
        assert scene.json(f"{command} {REPO}", HF_HUB_OFFLINE="1")["hub"]["repo"] == REPO
    scene.json(f"convert {REPO} offline --no-verify --no-card", HF_HUB_OFFLINE="1")
    assert contents(scene.folder / "offline") == contents(scene.folder / "online")
    assert scene.hub.log == []


@pytest.mark.slow
def test_a_source_on_the_hub_is_verified(scene: Scene, demo_source: Path) -> None:
    (demo_source / "chat_template.jinja").write_bytes(b"carried, and no JSON")
    scene.hub.add(REPO, demo_source)
    convert(demo_source, scene.folder / "out", flush=False)
    report = scene.json(f"verify out --source {REPO}")
    assert report["passed"]
    assert {check["name"] for check in report["checks"]} >= {"provenance", "decoder_parity", "vision_parity"}
    other = b"carried, another JSON"[:20]
    scene.hub.repos[REPO].commit({**contents(demo_source), "chat_template.jinja": other})
    done = scene(f"verify out --source {REPO}")
    assert done.returncode == 6
    assert "chat_template.jinja differs from the source's" in done.stdout


@pytest.mark.slow
def test_a_moved_branch_is_reported_with_the_converted_commit(scene: Scene, demo_source: Path) -> None:
    sha = scene.hub.add(REPO, demo_source)
    assert scene(f"convert {REPO} out --no-flush --no-verify --no-card").returncode == 0
    scene.hub.repos[REPO].commit({**contents(demo_source), "notes.txt": b"something else"})
    done = scene(f"verify out --source {REPO}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"it was made from commit {sha} of {REPO}" in done.stderr
    assert f"{REPO}@{sha}" in done.stderr
    assert scene.json(f"verify out --source {REPO}@{sha}")["passed"]


@pytest.mark.slow
def test_a_part_is_extracted_from_a_model_on_the_hub(scene: Scene, converted_twin: TwinFolder, tmp_path: Path) -> None:
    sha = scene.hub.add(REPO, converted_twin("images-sharded"))
    for part in ("encoder", "decoder"):
        done = scene(f"extract {REPO} {part} --part {part} --verify --no-card")
        assert done.returncode == 0, done.stderr
        manifest = json.loads((scene.folder / part / "t5g2.json").read_text())
        assert manifest["source"]["hub"] == {"repo": REPO, "revision": sha}
        convert(converted_twin("images-sharded"), tmp_path / part, part=part)
        weights = "model.safetensors"
        assert (scene.folder / part / weights).read_bytes() == (tmp_path / part / weights).read_bytes()


@pytest.mark.slow
def test_another_commit_than_the_converted_one_is_reported(scene: Scene, demo_source: Path) -> None:
    sha = scene.hub.add(REPO, demo_source)
    scene.json(f"convert {REPO} out --no-flush --no-verify --no-card")
    assert scene.json(f"verify out --source {REPO} --no-record")["passed"]
    path = scene.folder / "out/t5g2.json"
    false_manifest = json.loads(path.read_text())
    false_manifest["source"]["hub"] = {"repo": "google/other", "revision": "0" * 40}
    path.write_bytes(seal(false_manifest))
    done = scene(f"verify out --source {REPO}")
    assert done.returncode == 6
    recorded = f"records source google/other@{'0' * 40}, but {REPO}@{sha} was passed"
    assert recorded in done.stdout.replace("\n", " ")
    # A copy in a folder has no commit.
    assert scene.json(f"verify out --source {demo_source}")["passed"]


def test_a_model_of_the_hub_is_compared(scene: Scene, demo_source: Path) -> None:
    scene.hub.add(REPO, demo_source)
    convert(demo_source, scene.folder / "out", flush=False)
    (scene.folder / "text.txt").write_text("a text to be read by both")
    assert scene.json(f"compare {REPO} out --text text.txt")["decoder_alone"]["kl"] == 0


def test_only_the_shards_with_the_tower_of_a_donor_are_fetched(scene: Scene, twin_folder: TwinFolder) -> None:
    donor, source = twin_folder("images-sharded"), twin_folder("text-8")
    sha = scene.hub.add("google/donor", donor)
    assert scene.json(f"plan {source} --vision-from google/donor --projector copy")["options"] == {"projector": "copy"}
    scene.json(f"convert {source} out --vision-from google/donor --projector copy --no-flush --no-verify --no-card")
    manifest = json.loads((scene.folder / "out/t5g2.json").read_text())
    assert manifest["vision_from"]["hub"] == {"repo": "google/donor", "revision": sha}
    assert "hub" not in manifest["source"]
    fetched = {path.name for path in (scene.folder / "home").rglob("*.safetensors")}
    assert fetched == {name for name in manifest["vision_from"]["files"] if name.endswith(".safetensors")}
    assert 0 < len(fetched) < len(list(donor.glob("*.safetensors")))
    convert(source, scene.folder / "expected", vision_from=donor, projector="copy", flush=False)
    found, expected = contents(scene.folder / "out"), contents(scene.folder / "expected")
    assert without_hub(found.pop("t5g2.json")) == without_hub(expected.pop("t5g2.json"))
    assert found == expected


def test_only_the_shards_with_the_layers_of_the_decoders_parent_are_fetched(
    scene: Scene, twin_folder: TwinFolder
) -> None:
    other, source = twin_folder("text-sharded"), twin_folder("text-8")
    sha = scene.hub.add("google/other", other)
    options = "--decoder-from google/other --decoder-layers 0:4:3"
    planned = scene.json(f"plan {source} {options}")
    assert planned["options"] == {"decoder_layers": [0, 3]}
    assert planned["sources"]["decoder_from"]["hub"] == {"repo": "google/other", "revision": sha}
    assert "hub" not in planned["sources"]["source"]
    assert not list((scene.folder / "home").rglob("*.safetensors"))
    done = scene(f"convert {source} out {options} --no-flush --verify --no-card")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((scene.folder / "out/t5g2.json").read_text())
    assert manifest["decoder_from"]["hub"] == {"repo": "google/other", "revision": sha}
    fetched = {path.name for path in (scene.folder / "home").rglob("*.safetensors")}
    assert fetched == {name for name in manifest["decoder_from"]["files"] if name.endswith(".safetensors")}
    assert 0 < len(fetched) < len(list(other.glob("*.safetensors")))
    convert(source, scene.folder / "expected", decoder_from=other, decoder_layers="0:4:3", flush=False)
    found, expected = contents(scene.folder / "out"), contents(scene.folder / "expected")
    manifest = without_hub(found.pop("t5g2.json"))
    assert manifest.pop("verification")["passed"]
    assert manifest == without_hub(expected.pop("t5g2.json"))
    assert found == expected
    report = scene.json(f"verify out --source {source} --decoder-from google/other")
    assert report["passed"]


@pytest.mark.slow
def test_a_graft_without_projector_is_verified_without_its_shard(scene: Scene, twin_folder: TwinFolder) -> None:
    from tests.models.twins import split_off

    source = twin_folder("text-8")
    _, shard = split_off(twin_folder("donor-wide"), scene.folder / "donor", "mm_input_projection_weight")
    scene.hub.add("google/donor", scene.folder / "donor")
    assert scene.json(f"convert {source} out --vision-from google/donor --verify --no-flush --no-card")["verification"][
        "passed"
    ]
    report = scene.json(f"verify out --source {source} --vision-from google/donor")
    assert report["passed"]
    assert "vision_parity" in {check["name"] for check in report["checks"]}
    assert not list((scene.folder / "home").rglob(shard))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "command", ["inspect SOURCE", "plan SOURCE", "convert SOURCE out", "verify DONE --source SOURCE"]
)
def test_H1_a_gated_model_is_reported_before_any_work(scene: Scene, demo_source: Path, command: str) -> None:
    scene.hub.add(REPO, demo_source, gated_to={"bo"})
    scene.hub.users[TOKEN] = "ann"
    convert(demo_source, scene.folder / "done", flush=False)
    line = command.replace("SOURCE", REPO).replace("DONE", "done")
    for token, message in ("", "no token was given"), (TOKEN, "the token's user does not have access"):
        done = scene(line, **({"HF_TOKEN": token} if token else {}))
        assert done.returncode == 7
        assert done.stdout == ""
        page = f"accept the terms at {scene.hub.url}/{REPO}, then: hf auth login, or set HF_TOKEN"
        assert done.stderr == f"t5g2: {REPO}: is gated, and {message} ({page})\n"
    assert not (scene.folder / "out").exists()
    assert scene.hub.sent(SINGLE_FILE) == 0


@pytest.mark.sampled
@pytest.mark.parametrize("option", ["", " --json", " --debug"], ids=["plain", "json", "debug"])
@pytest.mark.parametrize("command", ["inspect SOURCE", "convert SOURCE out"])
def test_H6_a_token_is_in_nothing_that_is_printed_or_written(
    scene: Scene, demo_source: Path, command: str, option: str
) -> None:
    scene.hub.users[TOKEN] = "ann"
    scene.hub.add(REPO, demo_source, private_to={"ann"})
    scene.hub.add("google/other", demo_source, private_to={"bo"})
    for source, token, code in ((REPO, f"{TOKEN}x", 7), ("google/other", TOKEN, 7), (REPO, TOKEN, 0)):
        done = scene(command.replace("SOURCE", source) + option, HF_TOKEN=token)
        assert done.returncode == code, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    holders = [path for path in scene.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holders == []


def test_H1_offline_with_an_empty_cache(scene: Scene) -> None:
    for command in ("inspect a/b", "plan a/b", "convert a/b out"):
        done = scene(command, HF_HUB_OFFLINE="1")
        assert done.returncode == 7
        assert done.stderr.startswith(
            "t5g2: a/b: no such folder, HF_HUB_OFFLINE is set, and the Hub's cache has no such"
        )
        assert done.stderr.count("\n") == 1
    assert scene.hub.log == []
    assert list(scene.folder.glob("[!h]*")) == []


def test_H1_the_error_of_the_hub_is_a_document_too(scene: Scene) -> None:
    done = scene("plan a/b@v1 --json")
    assert done.returncode == 7
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["where"]) == (7, "a/b")
    assert error["message"].startswith("no such folder, and no such model on the Hub")


def test_a_folder_comes_before_a_model_of_its_name(scene: Scene, demo_source: Path) -> None:
    (scene.folder / "google").mkdir()
    (scene.folder / REPO).symlink_to(demo_source)
    assert "hub" not in scene.json(f"inspect {REPO}")
    assert scene.hub.log == []


def test_H1_an_unwritable_target_is_reported_before_any_request(scene: Scene) -> None:
    (scene.folder / "out").mkdir()
    (scene.folder / "out/mine.txt").touch()
    assert scene(f"convert {REPO} out --no-verify --no-card").returncode == 5
    assert scene.hub.log == []


def test_a_run_that_cannot_be_resumed_is_reported_before_any_request(scene: Scene) -> None:
    done = scene(f"convert {REPO} out --resume --no-hash --no-verify --no-card")
    assert done.returncode == 2
    assert "--resume needs sha256" in done.stderr
    assert scene.hub.log == []


def test_H2_an_interrupted_conversion_continues_with_the_downloaded_files(
    scene: Scene, twin_folder: TwinFolder
) -> None:
    source = twin_folder("text-sharded")
    scene.hub.add(REPO, source)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    scene.hub.faults.append(Fault(f"/resolve/.*{shards[-1]}", 99, status=404, method="HEAD"))
    done = scene(f"convert {REPO} out --no-verify --no-card")
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert not (scene.folder / "out").exists()
    scene.hub.faults.clear()
    scene.hub.log.clear()
    assert scene(f"convert {REPO} out --no-verify --no-card").returncode == 0
    assert {request.path.rpartition("/")[2] for request in scene.hub.log if request.sent > 1000} >= {shards[-1]}
    assert scene.hub.sent(shards[0]) == 0


def test_a_download_with_the_wrong_sha256_is_refused(scene: Scene, demo_source: Path) -> None:
    """Size and header are right; only the sha256 differs."""
    sha = scene.hub.add(REPO, demo_source)
    right = (demo_source / SINGLE_FILE).read_bytes()
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    files = scene.hub.repos[REPO].commits[sha]
    scene.hub.faults.append(Fault("/lfs/", 1, before=lambda: files.update({SINGLE_FILE: wrong})))
    done = scene(f"convert {REPO} out --no-verify --no-card")
    assert done.returncode == 3
    assert "the Hub gives" in done.stderr
    assert not (scene.folder / "out").exists()


def test_download_progress_is_shown_only_on_a_terminal(scene: Scene, demo_source: Path) -> None:
    import pty

    scene.hub.add(REPO, demo_source)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "t5g2convert", "convert", REPO, "out"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        cwd=scene.folder,
        env={**scene.hub.env(scene.folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"},
    ) as process:
        os.close(follower)
        shown = b""
        while piece := read_terminal(leader):
            shown += piece
    os.close(leader)
    assert process.returncode == 0
    assert b"download" in shown
    assert b"kB" in shown


def read_terminal(leader: int) -> bytes:
    try:
        return os.read(leader, 65_536)
    except OSError:
        return b""  # the other end was closed


def test_a_picture_is_read_with_a_tower_from_the_hub(scene: Scene, demo_source: Path) -> None:
    from PIL import Image

    scene.hub.add(REPO, demo_source)
    convert(demo_source, scene.folder / "out", flush=False)
    Image.new("RGB", (80, 40), (200, 30, 60)).save(scene.folder / "red.png")
    assert scene.json(f"verify out --source {REPO} --image red.png")["passed"]


def test_a_signal_ends_a_download(scene: Scene, demo_source: Path) -> None:
    scene.hub.add(REPO, demo_source)
    begun, over = threading.Event(), threading.Event()
    scene.hub.faults.append(Fault("/lfs/", 1))  # the header
    scene.hub.faults.append(Fault("/lfs/", 1, before=lambda: (begun.set(), over.wait(30))))
    command = [sys.executable, "-m", "t5g2convert", "convert", REPO, "out"]
    env = {**scene.hub.env(scene.folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=scene.folder, env=env, text=True) as process:
        assert begun.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        over.set()
        assert process.stderr is not None
        assert process.stderr.read() == "t5g2: stopped by signal 2\n"
    assert [path.name for path in scene.folder.iterdir()] == ["home"]
    assert list((scene.folder / "home").rglob("*.incomplete")) == []
