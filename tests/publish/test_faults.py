"""Faults of the Hub during uploads (rows H1 to H4, and H6): the real client against a faulty Hub."""

import signal
import threading
from pathlib import Path

import pytest

from t5g2convert import convert
from tests.hub.server import Fault, Repo
from tests.publish.scene import HASTY, RUN, Scene

UPLOAD = "upload out ann/model --card keep"
COMMIT = "/api/models/ann/model/commit/"
REFUSED = {
    "no token": ("ann/model", "uploading needs a token, but none is set"),
    "wrong token": ("ann/model", "the Hub rejected the token"),
    "a token that reads": ("ann/model", "the token is read-only"),
    "foreign namespace": ("bo/new", "ann may create models only under ann, lab"),
    "foreign public model": ("bo/open", "the token does not have write access"),
    "foreign private model": ("bo/closed", "no such model, and ann may create models only under"),
    "gated model": ("bo/gated --create-pr", "is gated, and the token's user does not have access"),
    "missing model": ("bo/new --create-pr", "no such model on the Hub"),
    "missing pull request": ("ann/there --revision refs/pr/9", "has no revision 'refs/pr/9'"),
    "offline": ("ann/model", "cannot upload while HF_HUB_OFFLINE is set"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", REFUSED)
def test_H1_missing_write_access_is_reported_before_anything_is_sent(scene: Scene, case: str) -> None:
    scene.hub.orgs["ann"] = {"lab"}
    scene.hub.repos["bo/open"], scene.hub.repos["bo/closed"] = Repo(), Repo(private_to={"bo"})
    scene.hub.repos["bo/gated"], scene.hub.repos["ann/there"] = Repo(gated_to=set()), Repo()
    for repo in scene.hub.repos.values():
        repo.commit({})
    if case == "a token that reads":
        scene.hub.reading.add(scene.token)
    env = {"no token": {"HF_TOKEN": ""}, "wrong token": {"HF_TOKEN": "hf_x"}, "offline": {"HF_HUB_OFFLINE": "1"}}
    target, message = REFUSED[case]
    assert message in scene.refused(f"upload out {target}", **env.get(case, {}))
    if "--" not in target:
        # convert does not even read its source.
        line = f"convert src new --push-to {target}"
        assert message in scene.refused(line, **env.get(case, {}))
        assert not (scene.folder / "new").exists()
    assert {request.method for request in scene.hub.log} <= {"GET"}


def test_H1_a_gated_model_is_not_reported_as_missing(scene: Scene) -> None:
    scene.hub.repos["ann/gated"] = Repo()
    scene.hub.repos["ann/gated"].commit({})
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model ann/gated is restricted"}
    scene.hub.faults.append(Fault("/auth-check/write", 1, status=403, headers=gated))
    assert "is gated, and the token's user does not have access" in scene.refused("upload out ann/gated")
    assert scene.hub.requests_to("") == []


def test_H1_a_wrong_or_missing_server_is_reported(scene: Scene) -> None:
    scene.hub.faults = [Fault("/api/whoami-v2", 1, status=200, body=b"<html>")]
    scene.hub.faults += [
        Fault("/auth-check", 1, status=200),
        Fault("/api/models/ann/model$", 1, status=200, body=b"[]"),
    ]
    assert "did not answer like the Hub" in scene.refused(UPLOAD, script=HASTY.replace("(0.0, 0.0)", "()"))
    assert "cannot be reached" in scene.refused(UPLOAD, script=HASTY, HF_ENDPOINT="http://127.0.0.1:9")


BUSY = {
    "whoami": [Fault("/api/whoami-v2", 1, status=429, headers={"ratelimit": '"api";r=0;t=1'})],
    "auth-check": [Fault("/auth-check", 1, dropped=True), Fault("/auth-check", 1, status=502, body=b"<html>")],
    "creation, busy": [Fault("/repos/create", 1, status=503, method="POST")],
    "creation, cut": [Fault("/repos/create", 1, dropped=True, method="POST")],
    "creation, answer lost": [Fault("/repos/create", 1, done=True, method="POST")],
    "refs": [Fault("/refs", 1, status=503)],
    "preupload": [Fault("/preupload/", 1, status=503, method="POST")],
    "batch": [Fault("/objects/batch", 1, dropped=True, method="POST")],
    "data, busy": [Fault("/lfs-put/", 1, status=503, method="PUT")],
    "data, cut": [Fault("/lfs-put/", 1, dropped=True, method="PUT")],
    "data, answer lost": [Fault("/lfs-put/", 1, done=True, method="PUT")],
    "card": [Fault("/validate-yaml", 1, status=503, method="POST", body=b"<html>")],
    "commit, too often": [Fault(COMMIT, 1, status=429, method="POST", headers={"Retry-After": "0"})],
    "commit, busy": [Fault(COMMIT, 1, status=503, method="POST")],
    "commit, cut": [Fault(COMMIT, 1, dropped=True, method="POST")],
    "tree": [Fault("/tree/", 1, status=503)],
}


@pytest.mark.sampled
@pytest.mark.parametrize("case", BUSY)
def test_H2_a_busy_hub_gets_another_request(scene: Scene, case: str) -> None:
    (scene.out / "README.md").write_text("---\nlicense: mit\n---\n")
    scene.hub.faults = [Fault(**vars(fault)) for fault in BUSY[case]]
    assert "sent 8 of 8 files" in scene.good(UPLOAD, HASTY)
    assert [fault.times for fault in scene.hub.faults] == [0] * len(scene.hub.faults)
    assert scene.there() == scene.expected()
    assert len(scene.hub.repos["ann/model"].commits) == 2


def test_H2_xet_gets_another_request(scene: Scene) -> None:
    scene.hub.xet_store = scene.folder.parent / "store"
    scene.hub.xet_store.mkdir()
    scene.hub.faults.append(Fault("/xet-write-token/", 1, status=503))
    scene.good(UPLOAD, HASTY, HF_HUB_DISABLE_XET="0")
    assert scene.there() == scene.expected()


@pytest.mark.slow
def test_H2_files_sent_before_a_failure_are_not_sent_again(scene: Scene) -> None:
    convert(scene.folder / "src", scene.folder / "sharded", max_shard_bytes=300_000, flush=False)
    line = "upload sharded ann/model --card keep"
    # All but the first file: the client tries six times.
    scene.hub.faults = [Fault("/lfs-put/", 1, method="PUT")]
    scene.hub.faults.append(Fault("/lfs-put/", 999, status=503, method="PUT", headers={"Retry-After": "0"}))
    message = scene.refused(line, script=HASTY)
    assert "answered with status 503" in message
    assert len(scene.hub.objects) == 1
    assert scene.there() == {}
    scene.hub.faults.clear()
    scene.hub.log.clear()
    scene.good(line)
    # The shards and their index are LFS files.
    large = [name for name in scene.expected("sharded") if "safetensors" in name]
    assert len(scene.hub.requests_to("/lfs-put/", "PUT")) == len(large) - 1
    assert scene.there() == scene.expected("sharded")


@pytest.mark.sampled
@pytest.mark.parametrize("status", [None, 504])
@pytest.mark.parametrize("proposed", [False, True], ids=["commit", "pull request"])
def test_H3_a_lost_answer_is_settled_by_the_checksums(scene: Scene, proposed: bool, status: int | None) -> None:
    scene.hub.repos["ann/model"] = Repo()
    main = scene.hub.repos["ann/model"].commit({})
    scene.hub.faults.append(Fault(COMMIT, 1, method="POST", done=True, status=status))
    line = f"{UPLOAD} --create-pr" if proposed else UPLOAD
    printed = scene.good(line, HASTY)
    repo = scene.hub.repos["ann/model"]
    assert "sent 7 of 7 files" in printed
    assert len(scene.hub.requests_to(COMMIT)) == 1, "it is not sent again"
    assert scene.there(ref="refs/pr/1" if proposed else "main") == scene.expected()
    assert len(repo.commits) == 2
    assert (repo.refs["main"] == main) == proposed
    assert ("/discussions/1" in printed) == proposed


@pytest.mark.sampled
@pytest.mark.parametrize("proposed", [False, True], ids=["commit", "pull request"])
def test_H3_where_it_cannot_be_settled_running_again_is_safe(scene: Scene, proposed: bool) -> None:
    scene.hub.repos["ann/model"] = Repo()
    scene.hub.repos["ann/model"].commit({})
    line = f"{UPLOAD} --create-pr" if proposed else UPLOAD
    # The commit is made; then the Hub stops answering.
    asked_afterwards = "/discussions" if proposed else "/refs"
    silent = Fault(asked_afterwards, 999, status=503)
    scene.hub.faults.append(Fault(COMMIT, 1, method="POST", done=True, before=lambda: scene.hub.faults.append(silent)))
    message = scene.refused(line, script=HASTY)
    assert "it is unknown whether the commit was made" in message
    assert "running again is safe" in message
    scene.hub.faults.clear()
    scene.hub.log.clear()
    assert "all 7 files are already on the Hub" in scene.good(line)
    assert scene.hub.requests_to(COMMIT) == []
    assert len(scene.hub.repos["ann/model"].commits) == 2


@pytest.mark.slow
def test_H3_an_unanswered_commit_is_reported_and_made_by_the_next_run(scene: Scene) -> None:
    scene.hub.repos["ann/model"] = Repo()
    scene.hub.repos["ann/model"].commit({})
    for line, tries in ((UPLOAD, 3), (f"{UPLOAD} --create-pr", 1)):
        scene.hub.log.clear()
        scene.hub.faults = [Fault(COMMIT, 999, method="POST", dropped=True)]
        assert "running again is safe" in scene.refused(line, script=HASTY)
        # A branch commit is retried, because it names its parent. A pull request might be made twice.
        assert len(scene.hub.requests_to(COMMIT)) == tries
    scene.hub.faults.clear()
    scene.good(f"{UPLOAD} --create-pr")
    scene.good(UPLOAD)
    assert len(scene.hub.repos["ann/model"].commits) == 3


@pytest.mark.sampled
@pytest.mark.parametrize(("proposed", "lost"), [(False, False), (False, True), (True, False)])
def test_H4_a_commit_of_somebody_else_is_not_overwritten(scene: Scene, proposed: bool, lost: bool) -> None:
    scene.hub.repos["ann/model"] = Repo()
    scene.hub.repos["ann/model"].commit({"config.json": b"old"})
    theirs = {"config.json": b"theirs"}
    fault = Fault(COMMIT, 1, method="POST", dropped=lost, before=lambda: scene.hub.repos["ann/model"].commit(theirs))
    scene.hub.faults.append(fault)
    message = scene.refused(f"{UPLOAD} --create-pr" if proposed else UPLOAD, script=HASTY)
    assert "has a new commit since the upload began: nothing was overwritten" in message
    assert scene.there() == theirs
    assert scene.hub.repos["ann/model"].pull_requests == []


def test_H4_a_commit_while_the_folder_is_read_is_noticed(scene: Scene) -> None:
    """The head is read before the commit, not during it."""
    scene.hub.repos["ann/model"] = Repo()
    scene.hub.repos["ann/model"].commit({})
    theirs = {"model.json": b"theirs"}
    scene.hub.faults.append(
        Fault("/preupload/", 1, method="POST", before=lambda: scene.hub.repos["ann/model"].commit(theirs))
    )
    assert "nothing was overwritten" in scene.refused(UPLOAD)
    assert scene.there() == theirs


@pytest.mark.slow
def test_other_bytes_on_the_hub_are_noticed_after_the_commit(scene: Scene) -> None:
    def spoil() -> None:
        repo = scene.hub.repos["ann/model"]
        files = repo.files()
        files["model.safetensors"] = files["model.safetensors"][:-1] + b"\0"
        del files["config.json"]

    scene.hub.faults.append(Fault("/tree/", 1))
    scene.hub.repos["ann/model"] = Repo()
    scene.hub.repos["ann/model"].commit({})
    scene.hub.faults.append(Fault("/tree/", 1, before=spoil))
    message = scene.refused(UPLOAD)
    assert "differs from the folder: config.json, model.safetensors" in message
    scene.good(UPLOAD)
    assert scene.there() == scene.expected()


def test_a_file_that_changes_while_it_is_sent_is_noticed(scene: Scene) -> None:
    changed = scene.out / "config.json"
    other = changed.read_bytes().replace(b"1", b"2", 1)
    scene.hub.faults.append(Fault("/preupload/", 1, method="POST", before=lambda: changed.write_bytes(other)))
    assert "differs from the folder: config.json" in scene.refused(UPLOAD)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["lfs", "xet"])
def test_a_signal_ends_an_upload(scene: Scene, transport: str) -> None:
    scene.settings["HF_HUB_DISABLE_XET"] = "0" if transport == "xet" else "1"
    scene.hub.xet_store = scene.folder.parent / "store"
    scene.hub.xet_store.mkdir()
    begun, over = threading.Event(), threading.Event()
    method, data = ("GET", "/xet-write-token/") if transport == "xet" else ("PUT", "/lfs-put/")
    scene.hub.faults.append(Fault(data, 1, method=method, before=lambda: (begun.set(), over.wait(60))))
    with scene.started(UPLOAD) as process:
        assert begun.wait(60)
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
        over.set()
        assert process.stderr is not None
        assert (code, process.stderr.read()) == (130, "t5g2: stopped by signal 2\n")
    scene.good(UPLOAD)
    assert scene.there() == scene.expected()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", " --debug", " --json"], ids=["plain", "debug", "json"])
@pytest.mark.parametrize("transport", ["lfs", "xet"])
def test_H6_the_token_is_in_nothing_that_an_upload_prints_or_writes(scene: Scene, option: str, transport: str) -> None:
    env = {"HF_HUB_DISABLE_XET": "0" if transport == "xet" else "1"}
    scene.hub.xet_store = scene.folder.parent / "store"
    scene.hub.xet_store.mkdir()
    data = "/xet-write-token/" if transport == "xet" else "/lfs-put/"
    method = "GET" if transport == "xet" else "PUT"
    runs: list[tuple[str, list[Fault], int, str]] = [
        ("upload out bo/model", [], 7, RUN),
        ("upload out ann/model", [Fault("/api/whoami-v2", 9, status=401)], 7, RUN),
        ("upload out ann/model", [Fault(data, 99, method=method, status=403)], 7, RUN),
        ("upload out ann/model", [Fault("/commit/", 9, method="POST", dropped=True)], 7, HASTY),
        ("upload out ann/model", [Fault("/commit/", 9, method="POST", status=400, body=scene.token.encode())], 7, RUN),
        ("convert src new --push-to ann/model", [], 0, RUN),
    ]
    for line, faults, code, script in runs:
        scene.hub.faults = faults
        done = scene.run(line + option, script, **env)
        assert done.returncode == code, (line, done.stderr)
        assert scene.token not in done.stdout + done.stderr, line
    for folder in (scene.folder, scene.hub.xet_store):
        assert [path for path in folder.rglob("*") if path.is_file() and holds(path, scene.token)] == []
    assert not [
        data
        for files in scene.hub.repos["ann/model"].commits.values()
        for data in files.values()
        if scene.token.encode() in data
    ]
    assert scene.there() == scene.expected("new")


def holds(path: Path, token: str) -> bool:
    return token.encode() in path.read_bytes()
