"""Hub models, read by the real client from a Hub on loopback."""

import hashlib
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from huggingface_hub import constants

from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.header import TensorEntry, encode_header
from t5g2convert.checkpoint.hub.open_and_fetch import HubId, fetch, missing, open_source, parse_id, size_of
from t5g2convert.checkpoint.hub.range_requests import FIRST_BYTES
from t5g2convert.checkpoint.hub.snapshot import silent_bar
from t5g2convert.conversion.plan.builder import plan
from t5g2convert.errors import CheckpointError, HubError, OutputError, T5g2Error
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.checkpoint.test_folder import FIRST, INDEX, SECOND, SHARDS, weights, write_index
from tests.hub.server import Fault, Hub, running
from tests.models.gemma_tokenizer import write_tokenizer

REPO: Final = "google/gemma-demo"
TOKEN: Final = "hf_thetokenofthetests"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return an empty Hub for the client of this process, without a token or retry delays."""
    with running() as server:
        point_to(server.url, tmp_path, monkeypatch)
        yield server


def point_to(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_ENDPOINT and HF_HOME set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def write_files(folder: Path, **files: bytes | str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {"config.json": '{"model_type": "gemma3"}', **files}.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Return a model with one weight file."""
    return write_files(tmp_path / "single", **{SINGLE_FILE: weights(["a", "b"]), "tokenizer.json": "{}"})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a model with two weight files, an index, and another file in a subfolder."""
    folder = write_files(tmp_path / "sharded", **{shard: weights(names) for shard, names in SHARDS.items()})
    write_index(folder / INDEX_FILE, INDEX)
    return folder


def large(nbytes: int, tensors: int = 1) -> bytes:
    """Return a sound file of zero tensors."""
    size = nbytes // tensors
    entries = [TensorEntry(f"tensor.{at}", "U8", (size,), size * at, size * (at + 1)) for at in range(tensors)]
    return encode_header(entries) + bytes(size * tensors)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("google/gemma-3-4b-pt", HubId("google/gemma-3-4b-pt")),
        ("google/gemma-3-4b-pt@main", HubId("google/gemma-3-4b-pt", "main")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("A_1.b/c.d-e_f@0123abc", HubId("A_1.b/c.d-e_f", "0123abc")),
        ("gemma", None),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        ("~/a", None),
        ("a/b/", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b@x@y", None),
        ("a/b@x y", None),
        ("a/b\n", None),
        ("a/b@x\n", None),
        ("a/../b", None),
        ("a/..b", None),
        ("a--b/c", None),
        ("a/b.git", None),
        ("https://huggingface.co/a/b", None),
        ("ä/b", None),
        ("", None),
    ],
)
def test_a_hub_model_is_distinguished_from_a_path(text: str, expected: HubId | None) -> None:
    assert parse_id(text) == expected
    assert expected is None or str(expected) == text


def test_an_existing_path_is_not_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert parse_id("a/b") == HubId("a/b")
    (tmp_path / "a/b").symlink_to("nowhere")
    assert parse_id("a/b") is None


def test_a_folder_is_opened_without_a_request(hub: Hub, single: Path) -> None:
    assert open_source(single) == open_source(str(single)) == open_checkpoint(single)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source(Path("google/gemma-demo"))
    assert hub.log == []


def test_a_model_is_opened_by_its_headers(hub: Hub, demo_source: Path) -> None:
    sha = hub.add(REPO, demo_source)
    here, there = open_checkpoint(demo_source), open_source(REPO)
    assert (there.tensors, there.config, there.config_text) == (here.tensors, here.config, here.config_text)
    assert {name: header.identity.size for name, header in there.files.items()} == {
        name: header.identity.size for name, header in here.files.items()
    }
    assert there.hub is not None
    assert (there.hub.repo, there.hub.revision, there.name) == (REPO, sha, REPO)
    assert there.path.name == sha
    digest = hashlib.sha256((demo_source / SINGLE_FILE).read_bytes()).hexdigest()
    assert there.hub.files[SINGLE_FILE].sha256 == digest
    assert hub.sent(SINGLE_FILE) == FIRST_BYTES < (demo_source / SINGLE_FILE).stat().st_size
    assert not (there.path / SINGLE_FILE).exists()


def test_the_files_of_a_model_are_known_without_fetching(hub: Hub, single: Path) -> None:
    (single / "tokenizer.model").write_bytes(bytes(100))
    (single / "big.json").write_bytes(b"[" + b" " * 5_000_000 + b"]")
    hub.add(REPO, single)
    checkpoint = open_source(REPO)
    for name in ("tokenizer.json", "tokenizer.model", "big.json", SINGLE_FILE):
        assert checkpoint.holds(name)
    assert not checkpoint.holds("generation_config.json")
    assert {path.name for path in checkpoint.path.iterdir()} == {"config.json", "tokenizer.json"}


def test_only_files_at_the_top_level_count(hub: Hub, single: Path) -> None:
    hub.add(REPO, single)
    hub.repos[REPO].commit({**hub.repos[REPO].commits[hub.repos[REPO].refs["main"]], "original/x.json": b"{}"})
    checkpoint = open_source(REPO)
    assert not any("/" in name for name in checkpoint.hub.files) if checkpoint.hub else False


def test_a_sharded_model_is_opened(hub: Hub, sharded: Path) -> None:
    hub.add(REPO, sharded)
    checkpoint = open_source(REPO)
    assert list(checkpoint.files) == [FIRST, SECOND]
    assert {name: stored.file for name, stored in checkpoint.tensors.items()} == INDEX


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_header_longer_than_the_first_request_takes_one_more(hub: Hub, single: Path, knows_ranges: bool) -> None:
    data = large(30_000_000, tensors=3000)
    header_size = 8 + int.from_bytes(data[:8], "little")
    assert header_size > FIRST_BYTES
    (single / SINGLE_FILE).write_bytes(data)
    hub.add(REPO, single)
    hub.knows_ranges = knows_ranges
    assert open_source(REPO).tensors == open_checkpoint(single).tensors
    requests_to = [request.range for request in hub.log if request.path.startswith("/lfs/")]
    assert requests_to == [f"bytes=0-{FIRST_BYTES - 1}", f"bytes={FIRST_BYTES}-{header_size - 1}"]
    # Without ranges, data that the system had buffered was sent as well.
    assert hub.sent(SINGLE_FILE) == header_size if knows_ranges else hub.sent(SINGLE_FILE) < len(data)


POINTER: Final = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DAMAGE: Final[dict[str, Callable[[Path], object]]] = {
    "git-lfs": lambda folder: (folder / SINGLE_FILE).write_bytes(POINTER),
    "html": lambda folder: (folder / SINGLE_FILE).write_text("<!DOCTYPE html><html></html>"),
    "truncated": lambda folder: (folder / SINGLE_FILE).write_bytes(weights(["a", "b"])[:-1]),
    "header truncated": lambda folder: (folder / SINGLE_FILE).write_bytes(weights(["a", "b"])[:40]),
    "a tail": lambda folder: (folder / SINGLE_FILE).write_bytes(weights(["a", "b"]) + b"x"),
    "empty": lambda folder: (folder / SINGLE_FILE).write_bytes(b""),
    "seven bytes": lambda folder: (folder / SINGLE_FILE).write_bytes(bytes(7)),
    "no weights": lambda folder: (folder / SINGLE_FILE).unlink(),
    "pickles": lambda folder: (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin"),
    "another name": lambda folder: (folder / SINGLE_FILE).rename(folder / "weights.safetensors"),
    "an index into nothing": lambda folder: (
        (folder / SINGLE_FILE).unlink(),
        write_index(folder / INDEX_FILE, INDEX),
    ),
    "an index out of the folder": lambda folder: write_index(folder / INDEX_FILE, {"a": "../../x.safetensors"}),
    "an index that lies": lambda folder: write_index(folder / INDEX_FILE, {"a": SINGLE_FILE}),
    "a broken config": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_bad_models_are_refused_as_bad_folders_are(damage: Callable[[Path], object], hub: Hub, single: Path) -> None:
    damage(single)
    hub.add(REPO, single)
    with pytest.raises(CheckpointError) as here:
        open_checkpoint(single)
    with pytest.raises(CheckpointError) as there:
        open_source(REPO)
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)


def test_a_model_without_config_is_refused(hub: Hub, single: Path) -> None:
    (single / "config.json").unlink()
    hub.add(REPO, single)
    with pytest.raises(CheckpointError, match=f"{REPO}: has no config.json"):
        open_source(REPO)


def test_a_shard_that_is_not_on_the_hub_is_named(hub: Hub, sharded: Path) -> None:
    (sharded / SECOND).unlink()
    hub.add(REPO, sharded)
    with pytest.raises(CheckpointError, match=f"{REPO}/{SECOND}: is missing"):
        open_source(REPO)


def test_a_stray_index_is_noted(hub: Hub, single: Path) -> None:
    write_index(single / INDEX_FILE, INDEX)
    hub.add(REPO, single)
    assert open_source(REPO).notes == open_checkpoint(single).notes != ()


# Errors of the Hub


@dataclass
class Refusal:
    message: str
    hint: str
    token: str | None = None
    source: str = REPO
    access: dict[str, set[str] | None] | None = None
    fault: Fault | None = None


INFO, FILES = "/api/models/", "/resolve/"
REFUSALS: Final = {
    "gated, no token": Refusal("is gated, and no token was given", "accept the terms at", access={"gated_to": {"bo"}}),
    "gated, not to this user": Refusal(
        "is gated, and the token's user does not have access", "accept the terms at", TOKEN, access={"gated_to": {"bo"}}
    ),
    "private, no token": Refusal(
        "no such folder, and no such model on the Hub, or it is private and no token was given",
        "hf auth login, or set HF_TOKEN",
        access={"private_to": {"bo"}},
    ),
    "private, another's": Refusal(
        "no such folder, and no such model on the Hub, or the token may not read it",
        "check the name",
        TOKEN,
        access={"private_to": {"bo"}},
    ),
    "missing, no token": Refusal("no such folder, and no such model on the Hub", "check the name", source="a/b"),
    "missing": Refusal("no such folder, and no such model on the Hub", "check the name", TOKEN, source="a/b"),
    "wrong token": Refusal("the Hub rejected the token", "hf auth login, or set HF_TOKEN", "hf_nobody"),
    "missing branch": Refusal("has no revision 'v9'", "pass a branch, a tag or a commit", source=f"{REPO}@v9"),
    "missing commit": Refusal("has no revision '0{40}'", "pass a branch", source=f"{REPO}@{'0' * 40}"),
    "a token too weak": Refusal("the token may not read it", "permission", TOKEN, fault=Fault(INFO, 9, status=403)),
    "disabled": Refusal(
        "was disabled",
        "another model",
        fault=Fault(INFO, 9, status=403, headers={"X-Error-Message": "Access to this resource is disabled."}),
    ),
    "too many requests": Refusal("received too many requests", "wait", fault=Fault(INFO, 9, status=429)),
    "no token at all": Refusal("the Hub requires a token", "hf auth login", fault=Fault(FILES, 99, status=401)),
    "broken": Refusal("answered with status 500", "try again later", fault=Fault(INFO, 9, status=500)),
    "broken, later": Refusal("answered with status 503", "try again later", fault=Fault(SINGLE_FILE, 99, status=503)),
    "a file that went": Refusal(
        "is missing a file",
        "try again",
        fault=Fault(SINGLE_FILE, 9, status=404, headers={"X-Error-Code": "EntryNotFound"}),
    ),
    "another web server": Refusal(
        "did not answer like the Hub", "HF_ENDPOINT", fault=Fault(INFO, 9, 200, body=b"<html>")
    ),
    "half an answer": Refusal(
        "did not answer like the Hub",
        "HF_ENDPOINT",
        fault=Fault(INFO, 9, 200, body=b'{"id": 1, "siblings": [{"rfilename": "config.json"}]}'),
    ),
    "another range": Refusal(
        "answers with 'bytes 0-9/10'",
        "try again later",
        fault=Fault("/lfs/", 9, 206, headers={"Content-Range": "bytes 0-9/10"}),
    ),
    "less than was asked for": Refusal(
        "was closed while part of a file was read .10 of 100000 bytes",
        "try again",
        fault=Fault("/lfs/", 9, 206, headers={"Content-Range": "bytes 0-9/*"}, body=bytes(10)),
    ),
    "another size": Refusal("answers with '3'", "try again later", fault=Fault("/lfs/", 9, 200, body=b"abc")),
    "cut again and again": Refusal(
        "was closed while part of a file was read", "try again", fault=Fault("/lfs/", 9, cut_after=9)
    ),
    "cut at once": Refusal("cannot be reached, or closed the", "try again", fault=Fault(INFO, 9, cut_after=3)),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=list(REFUSALS))
def test_H1_a_refusal_by_the_hub_is_a_one_line_error(
    case: Refusal, hub: Hub, demo_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.users[TOKEN] = "ann"
    if case.token is not None:
        monkeypatch.setenv("HF_TOKEN", case.token)
    hub.add(REPO, demo_source, **(case.access or {}))
    hub.faults += [] if case.fault is None else [case.fault]
    with pytest.raises(HubError, match=case.message) as refused:
        open_source(case.source)
    error = refused.value
    assert error.exit_code == 7
    assert case.hint in (error.hint or "")
    assert str(error.where).startswith(case.source.partition("@")[0])
    assert "\n" not in str(error)
    assert case.token is None or case.token not in "".join(traceback.format_exception(error))
    assert hub.sent(SINGLE_FILE) <= FIRST_BYTES


def test_H1_the_page_of_a_gated_model_is_named(hub: Hub, single: Path) -> None:
    hub.add(REPO, single, gated_to=set())
    with pytest.raises(HubError) as refused:
        open_source(REPO)
    assert refused.value.hint == f"accept the terms at {hub.url}/{REPO}, then: hf auth login, or set HF_TOKEN"


@pytest.mark.parametrize("access", ["private_to", "gated_to"])
def test_a_token_opens_what_its_user_may_read(
    access: str, hub: Hub, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.users[TOKEN] = "ann"
    hub.add(REPO, single, **{access: {"ann"}})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    checkpoint = open_source(REPO)
    assert fetch(checkpoint, checkpoint.files).files == open_checkpoint(checkpoint.path).files


@pytest.mark.parametrize("token", ["hf_sch\u00f6n", "hf_one two", "hf_\u2026"])
def test_H1_a_token_that_cannot_be_sent_is_reported_but_not_shown(
    token: str, hub: Hub, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, single)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=r"the token has invalid characters \(set it again: ") as found:
        open_source(REPO)
    assert token not in str(found.value)


def test_H1_an_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as gone:
        pass
    point_to(gone.url.replace("//", "//user:secret@"), tmp_path, monkeypatch)
    with pytest.raises(HubError, match=r"^google/gemma-demo: 127.0.0.1 cannot be reached") as refused:
        open_source(REPO)
    assert "secret" not in str(refused.value)


def test_H1_a_hub_that_does_not_answer(hub: Hub, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    hub.add(REPO, single)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    done = threading.Event()
    hub.faults.append(Fault(INFO, 1, before=lambda: done.wait(10)))
    with pytest.raises(HubError, match="did not answer in time"):
        open_source(REPO)
    done.set()


def test_H1_offline_with_nothing_in_the_cache(hub: Hub, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, single)
    offline(monkeypatch)
    with pytest.raises(HubError, match="no such folder, HF_HUB_OFFLINE is set, and the Hub's cache has no such model"):
        open_source(REPO)
    assert hub.log == []


def test_H1_offline_with_headers_alone_in_the_cache(hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, sharded)
    checkpoint = open_source(REPO)
    offline(monkeypatch)
    for fetched, message in ([], f"names files that are missing: {FIRST}, {SECOND}"), ([FIRST], f"{SECOND} is missing"):
        with monkeypatch.context() as online:
            online.setattr(constants, "HF_HUB_OFFLINE", False)
            fetch(checkpoint, fetched)
        with pytest.raises(HubError, match=f"the model is incomplete in the Hub's cache: .*{message}") as caught:
            open_source(REPO)
        absent = " ".join(name for name in (FIRST, SECOND) if name not in fetched)
        command = f"HF_HUB_OFFLINE=0 hf download {REPO} {absent} --revision {checkpoint.path.name}"
        assert caught.value.hint == command
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        fetch(checkpoint, [SECOND])


def test_offline_everything_that_was_fetched_is_there(hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, sharded)
    checkpoint = open_source(REPO)
    fetched = fetch(checkpoint, [*checkpoint.files, "config.json"])
    offline(monkeypatch)
    hub.log.clear()
    for source in (REPO, f"{REPO}@main", f"{REPO}@{checkpoint.path.name}"):
        found = open_source(source)
        assert (found.path, found.files, found.tensors) == (fetched.path, fetched.files, fetched.tensors)
        assert found.hub is not None
        assert checkpoint.hub is not None
        assert found.hub.revision == checkpoint.hub.revision
        assert fetch(found, found.files) == found
    assert hub.log == []


# Fetching


def test_only_requested_files_are_fetched(hub: Hub, sharded: Path) -> None:
    hub.add(REPO, sharded)
    checkpoint = open_source(REPO)
    size = (sharded / FIRST).stat().st_size
    assert size_of(checkpoint, missing(checkpoint, [FIRST, FIRST, "config.json"])) == size
    progress: list[int] = []
    fetched = fetch(checkpoint, [FIRST, FIRST, "config.json"], progress=progress.append)
    assert sum(progress) == size
    assert (fetched.path / FIRST).read_bytes() == (sharded / FIRST).read_bytes()
    assert not (fetched.path / SECOND).exists()
    assert fetched.files[FIRST] == open_checkpoint_files(fetched.path, FIRST)
    assert fetched.files[SECOND] == checkpoint.files[SECOND]
    assert missing(fetched, checkpoint.files) == [SECOND]
    hub.log.clear()
    assert fetch(checkpoint, [FIRST, "config.json"]) == fetched
    assert hub.log == []


def open_checkpoint_files(folder: Path, name: str) -> Any:
    from t5g2convert.checkpoint.header import read_header

    return read_header(folder / name)


def test_a_folder_has_nothing_to_fetch(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert fetch(checkpoint, checkpoint.files) is checkpoint
    assert missing(checkpoint, checkpoint.files) == []
    assert size_of(checkpoint, checkpoint.files) == 0


def test_the_commit_that_was_opened_is_fetched_whatever_its_branch_does(hub: Hub, single: Path, tmp_path: Path) -> None:
    first = hub.add(REPO, single)
    checkpoint = open_source(f"{REPO}@main")
    before = (single / SINGLE_FILE).read_bytes()
    hub.repos[REPO].commit({"config.json": b"{}", SINGLE_FILE: weights(["c"])})
    fetched = fetch(checkpoint, checkpoint.files)
    assert fetched.path.name == first
    assert (fetched.path / SINGLE_FILE).read_bytes() == before
    assert list(open_source(f"{REPO}@main").tensors) == ["c"]
    assert list(open_source(f"{REPO}@{first}").tensors) == ["a", "b"]


def test_a_branch_that_moves_while_it_is_opened_is_opened_as_it_is_then(hub: Hub, single: Path) -> None:
    hub.add(REPO, single)
    later = {"config.json": b"{}", SINGLE_FILE: weights(["c"])}
    hub.faults.append(Fault("resolve/main", 1, method="HEAD", before=lambda: hub.repos[REPO].commit(later)))
    checkpoint = open_source(REPO)
    assert checkpoint.path.name == hub.repos[REPO].refs["main"]
    assert list(checkpoint.tensors) == ["c"]


def test_a_commit_that_was_fetched_before_is_not_taken_for_the_branch(hub: Hub, single: Path) -> None:
    hub.add(REPO, single)
    open_source(REPO)
    hub.repos[REPO].commit({"config.json": b"{}", SINGLE_FILE: weights(["c"])})
    hub.faults.append(Fault("resolve/main", 99, status=503, method="HEAD"))
    with pytest.raises(HubError, match="the commit of the branch is unknown"):
        open_source(REPO)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "feature/long context"])
def test_branches_and_tags_are_found(revision: str, hub: Hub, single: Path) -> None:
    hub.add(REPO, single)
    sha = hub.repos[REPO].commit({"config.json": b"{}", SINGLE_FILE: weights(["c"])}, revision)
    if " " in revision:
        assert parse_id(f"{REPO}@{revision}") is None
        return
    assert open_source(f"{REPO}@{revision}").path.name == sha


def test_H2_a_header_is_requested_again(hub: Hub, demo_source: Path) -> None:
    hub.add(REPO, demo_source)
    hub.faults += [Fault("/lfs/", 1, status=503), Fault("/lfs/", 2, cut_after=1000)]
    assert open_source(REPO).tensors == open_checkpoint(demo_source).tensors
    assert [fault.times for fault in hub.faults] == [0, 0]


def test_H2_an_interrupted_download_continues(hub: Hub, demo_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # at most 10 MB are lost when cut
    hub.add(REPO, demo_source)
    checkpoint = open_source(REPO)
    hub.faults += [Fault("/lfs/", 1, cut_after=300_000), Fault("/lfs/", 1, status=429)]
    reported: list[int] = []
    fetched = fetch(checkpoint, checkpoint.files, progress=reported.append)
    data = (demo_source / SINGLE_FILE).read_bytes()
    assert (fetched.path / SINGLE_FILE).read_bytes() == data
    requests_to = [request.range for request in hub.log if request.path.startswith("/lfs/") and request.status != 429]
    assert requests_to[1:] == [None, f"bytes={300_000 >> 16 << 16}-"]
    assert sum(reported) == len(data)


def test_H2_files_that_are_complete_are_kept(hub: Hub, sharded: Path) -> None:
    hub.add(REPO, sharded)
    checkpoint = open_source(REPO)
    hub.faults.append(Fault(f"/lfs/.*{SECOND}", 99, cut_after=10))
    with pytest.raises(HubError, match="cannot be reached, or closed the connection"):
        fetch(checkpoint, checkpoint.files)
    assert missing(checkpoint, checkpoint.files) == [SECOND]
    hub.faults.clear()
    hub.log.clear()
    fetch(checkpoint, checkpoint.files)
    assert hub.sent(FIRST) == 0
    assert hub.sent(SECOND) == (sharded / SECOND).stat().st_size


def test_a_file_with_another_header_than_was_planned_is_refused(hub: Hub, single: Path) -> None:
    sha = hub.add(REPO, single)
    checkpoint = open_source(REPO)
    hub.repos[REPO].commits[sha][SINGLE_FILE] = weights(["a", "c"])
    with pytest.raises(CheckpointError, match="has a different header than on the Hub"):
        fetch(checkpoint, checkpoint.files)


def test_a_file_of_the_cache_that_is_not_the_hubs_is_refused(hub: Hub, single: Path) -> None:
    hub.add(REPO, single)
    checkpoint = fetch(open_source(REPO), [SINGLE_FILE])
    (checkpoint.path / SINGLE_FILE).resolve().write_bytes(weights(["a"]))
    with pytest.raises(CheckpointError, match=r"model.safetensors: has \d+ bytes, the Hub's has") as caught:
        open_source(REPO)
    # The hint names the file itself and not its link: removing only the link would change nothing.
    found = re.fullmatch(r"remove (.+) and run again: it is downloaded again", caught.value.hint or "")
    assert found is not None
    Path(found[1]).unlink()
    again = fetch(open_source(REPO), [SINGLE_FILE])
    assert (again.path / SINGLE_FILE).read_bytes() == (single / SINGLE_FILE).read_bytes()


def test_a_disk_too_small_for_the_download_is_reported_first(
    hub: Hub, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, single)
    checkpoint = open_source(REPO)
    usage = shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="cache has 1 bytes free, the download needs"):
        fetch(checkpoint, checkpoint.files)
    assert hub.sent(SINGLE_FILE) < FIRST_BYTES


def test_an_unwritable_cache_is_reported(hub: Hub, single: Path, tmp_path: Path) -> None:
    hub.add(REPO, single)
    (tmp_path / "hub").write_text("no folder")
    with pytest.raises(OutputError, match="the Hub's cache cannot be written"):
        open_source(REPO)


def test_the_bytes_of_a_chunked_download_are_counted_once() -> None:
    """The client's other transport counts network bytes and file bytes separately."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    progress: list[int] = []
    bars = {"total": 100, "log_level": 30, "name": "huggingface_hub.xet_get", "tqdm_class": silent_bar(progress.append)}
    with XetDownloadProgressReporter(reconstruction_desc="files", **bars) as reporter:
        for network, files in ((20, 0), (30, 40), (50, 100)):
            report = SimpleNamespace(
                total_bytes=100,
                total_bytes_completed=files,
                total_bytes_completion_rate=1.0,
                total_transfer_bytes=50,
                total_transfer_bytes_completed=network,
                total_transfer_bytes_completion_rate=1.0,
            )
            reporter.update_progress(report)
    assert progress == [40, 60]


def test_errors_of_our_own_pass_as_they_are() -> None:
    from t5g2convert.checkpoint.hub.hub_errors import hub_errors

    with pytest.raises(T5g2Error, match="ours"), hub_errors(REPO):
        raise CheckpointError("ours")


@pytest.mark.slow
def test_a_tokenizer_is_fetched_for_a_plan_that_changes_it(
    hub: Hub, tmp_path: Path, gemma3_map: WeightMap, demo_config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5g2convert.checkpoint.hub.snapshot.SMALL_BYTES", 100_000)
    source = tmp_path / "source"
    source.mkdir()
    config = {key: value for key, value in demo_config.items() if not key.endswith("_token_index")}
    config["text_config"] = {**config["text_config"], "vocab_size": 262_208}
    write_synthetic_source(source, gemma3_map, config, seed=None)
    write_tokenizer(source)
    assert (source / "tokenizer.json").stat().st_size > 100_000
    hub.add(REPO, source)
    checkpoint = open_source(REPO)
    assert missing(checkpoint, ["tokenizer.json"])
    planned = plan(checkpoint)
    assert not missing(checkpoint, ["tokenizer.json"])
    assert [file.text for file in planned.files] == [file.text for file in plan(source).files]
    assert any(file.how == "changed" for file in planned.files)
    assert hub.sent(SINGLE_FILE) == FIRST_BYTES


def test_a_listing_of_json_is_read(hub: Hub, single: Path) -> None:
    (single / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    hub.add(REPO, single)
    assert json.loads((open_source(REPO).path / "generation_config.json").read_text()) == {"eos_token_id": 1}


NO_MODELS: Final[dict[str, tuple[dict[str, str], str, str]]] = {
    "gguf": ({"gemma-Q4_0.gguf": "", "README.md": ""}, "holds llama.cpp weights (GGUF)", "hf download"),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "google/gemma-3-1b"}', "adapter_model.safetensors": ""},
        "is a LoRA adapter of google/gemma-3-1b",
        f"hf download {REPO} --local-dir FOLDER, then merge it first",
    ),
    "onnx": ({"config.json": "{}", "onnx/model.onnx": ""}, "is an ONNX model: onnx/model.onnx", "original"),
    "a folder inside": ({"4b/config.json": "{}"}, "holds no model, only folders with models", "FOLDER/4b"),
    "orbax": ({"_METADATA": "", "d/0/1": ""}, "is a JAX checkpoint (Orbax)", "safetensors"),
    "nothing known": ({"README.md": ""}, "has no config.json", "safetensors"),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_a_repository_without_a_checkpoint_is_described(case: str, hub: Hub, tmp_path: Path) -> None:
    files, what, step = NO_MODELS[case]
    for name, text in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    hub.add(REPO, tmp_path / "model")
    with pytest.raises(CheckpointError) as refused:
        open_source(REPO)
    assert what in refused.value.message
    assert step in (refused.value.hint or "")
    assert REPO in (refused.value.where or "")


def test_an_adapter_next_to_the_weights_is_refused(hub: Hub, demo_source: Path) -> None:
    (demo_source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    hub.add(REPO, demo_source)
    with pytest.raises(CheckpointError, match="transformers loads both"):
        open_source(REPO)


def test_further_chat_templates_are_listed_and_fetched(
    hub: Hub, demo_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = demo_source / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ documents }}")
    (demo_source / "onnx").mkdir()
    (demo_source / "onnx/model.onnx").write_text("x")
    hub.add(REPO, demo_source)
    source = open_source(REPO)
    planned = plan(source)
    name = "additional_chat_templates/rag.jinja"
    assert name in [file.name for file in planned.files]
    assert missing(source, [name]) == [name]
    assert (fetch(source, planned.reads["source"]).path / name).read_text() == "{{ documents }}"
    offline(monkeypatch)
    assert name in [file.name for file in plan(REPO).files]
