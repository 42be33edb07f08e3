"""A model's whole life: converted, verified, uploaded, downloaded, loaded, compared, extracted, converted again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from tests.hub.server import running
from tests.publish.scene import Scene

SOURCE: Final = "google/gemma-3-tiny"
LOADED: Final = """
import json, sys
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSeq2SeqLM

def logits(place):
    model = AutoModelForSeq2SeqLM.from_pretrained(place, attn_implementation="eager").eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits

here, there = logits(sys.argv[1]), logits(sys.argv[2])
print(json.dumps({
    "equal": torch.equal(here, there),
    "finite": bool(here.isfinite().all()),
    "differ": bool((here[0] != here[1]).any()),
    "snapshot": snapshot_download(sys.argv[2]),
}))
"""


@pytest.fixture
def scene(tmp_path: Path, demo_source: Path) -> Iterator[Scene]:
    """Return a Hub with a gated Gemma 3; ann has accepted its terms."""
    with running() as hub:
        hub.users["hf_life"] = "ann"
        (demo_source / "README.md").write_text("---\nlicense: gemma\n---\n# A tiny one\n")
        hub.add(SOURCE, demo_source, gated_to={"ann"})
        hub.xet_store = tmp_path / "store"
        hub.xet_store.mkdir()
        (tmp_path / "work").mkdir()
        (tmp_path / "work/text.txt").write_text("a text that both models read, word by word")
        # The client chooses xet itself.
        yield Scene(hub, tmp_path / "work", "hf_life", {"HF_HUB_DISABLE_XET": "0"})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_whole_life_of_a_model(scene: Scene) -> None:
    def t5g2(line: str) -> dict[str, Any]:
        return dict(json.loads(scene.good(f"{line} --json")))

    # Converted and verified, uploaded.
    result = t5g2(f"convert {SOURCE} out --verify --push-to ann/t5gemma-2-tiny")
    assert result["verification"]["passed"]
    assert result["upload"]["private"]
    assert scene.there("ann/t5gemma-2-tiny") == scene.expected()
    # Downloaded, and loaded by name in transformers: it computes the same as the folder.
    done = scene.python(["-c", LOADED, "out", "ann/t5gemma-2-tiny"])
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert (loaded["equal"], loaded["finite"], loaded["differ"]) == (True, True, True)
    # Verified again as it came down, and compared with its source.
    assert t5g2(f"verify {loaded['snapshot']} --source {SOURCE}")["passed"]
    compared = t5g2(f"compare {SOURCE} {loaded['snapshot']} --text text.txt")
    assert compared["decoder_alone"]["kl"] == 0
    # Extracted by its Hub name, uploaded as Gemma 3, and converted from there: the same weights.
    t5g2("extract ann/t5gemma-2-tiny gemma --part decoder --verify --push-to ann/gemma-3-tiny")
    t5g2("convert ann/gemma-3-tiny again")
    before, after = tensors(scene.out), tensors(scene.folder / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = json.loads(scene.expected("again")["t5g2.json"])
    revision = scene.hub.repos["ann/gemma-3-tiny"].refs["main"]
    assert again["source"]["hub"] == {"repo": "ann/gemma-3-tiny", "revision": revision}
    # Uploading again sends nothing.
    result = t5g2("upload out ann/t5gemma-2-tiny --card keep")
    assert [file["name"] for file in result["files"] if file["sent"]] == []
    assert scene.hub.requests_to("/xet-write-token/", "GET")
    assert scene.hub.requests_to("/lfs-put/", "PUT") == []
