"""Every example runs."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from t5g2convert import convert, inspect, verify
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.conftest import TwinFolder
from tests.examples.conftest import EXAMPLES, run
from tests.models.gemma_tokenizer import write_processor, write_tokenizer
from tests.processes.forked import Preload, python

TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "benchmark_convert.py",
        "benchmark_finetune.py",
        "benchmark_forward.py",
        "benchmark_generate.py",
        "benchmark_graft.py",
        "benchmark_schedule.py",
        "benchmark_sources.py",
        "benchmark_start.py",
        "benchmark_training.py",
        "benchmark_ul2.py",
        "benchmark_verify.py",
        "chat.py",
        "compare_resumes.py",
        "convert_gemma2.py",
        "convert_text.py",
        "convert_unbalanced.py",
        "convert_with_vision.py",
        "dates.py",
        "embedding.py",
        "exact_match.py",
        "extract_decoder.py",
        "extract_encoder.py",
        "finetune_with_trainer.py",
        "real_gemma3.py",
        "run_in_transformers.py",
        "translation.py",
        "convert_with_transformers.py",
    }


@pytest.mark.slow
def test_the_benchmark_measures_everyone(tmp_path: Path) -> None:
    command = [
        str(EXAMPLES / "benchmark_convert.py"),
        "tiny",
        "27b",
        "--rounds",
        "1",
        "--folder",
        str(tmp_path),
    ]
    run = python(command, preload=Preload.TRANSFORMERS, check=True)
    for name in ("cp ", "cp, then sync", "t5g2 convert --no-hash --no-flush", "transformers, meta device"):
        assert any(line.startswith(name) for line in run.stdout.splitlines()), run.stdout
    assert "27b: planned in " in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_forward_benchmark_measures_everyone_with_every_dtype(tmp_path: Path) -> None:
    script = str(EXAMPLES / "benchmark_forward.py")
    command = [script, "tiny", "--rounds", "1", "--folder", str(tmp_path)]
    run = python(command, preload=Preload.TRANSFORMERS, check=True)
    for dtype in ("float32", "bfloat16"):
        assert f"tiny-tiny, {dtype}: 512 tokens in, 64 out, one pass" in run.stdout
        assert f"tiny-tiny, {dtype}: 512 tokens in, 64 written greedily" in run.stdout
    for name in ("t5g2 reference", "transformers, sdpa", "transformers, eager"):
        assert sum(line.startswith(f"{name}  ") for line in run.stdout.splitlines()) == 4, run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_generate_benchmark_measures_both_with_every_dtype(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "benchmark_generate.py"), "tiny", "--rounds", "1", "--folder", str(tmp_path)]
    run = python(command, preload=Preload.TRANSFORMERS, check=True)
    for dtype in ("float32", "bfloat16"):
        for count in (16, 512):
            assert f"{dtype}, {count} tokens in, 64 written: t5g2 generate " in run.stdout
    assert run.stdout.count("ratio") == 4
    assert list(tmp_path.iterdir()) == []


def test_the_ul2_benchmark_makes_a_million_tokens_a_second() -> None:
    script = str(EXAMPLES / "benchmark_ul2.py")
    command = [script, "512", "16384", "--rounds", "3", "--tokens", "300000"]
    run = python(command, preload=Preload.TRANSFORMERS, check=True)
    rows = [line.split() for line in run.stdout.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("512", "39"), ("16384", "1260")]
    assert all(float(row[-2]) > 1 for row in rows), run.stdout


@pytest.mark.slow
def test_the_verify_benchmark_verifies(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "benchmark_verify.py"), "tiny", "--folder", str(tmp_path)]
    run = python(command, preload=Preload.TRANSFORMERS, check=True)
    row = next(line for line in run.stdout.splitlines() if line.startswith("tiny"))
    assert float(row.split()[-1]) > 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_graft_is_measured_with_both_projectors(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "benchmark_graft.py"), "tiny", "tiny-vision", "--folder", str(tmp_path)]
    printed = python(command, preload=Preload.TRANSFORMERS, check=True).stdout
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [name, what] for name in ("zeros", "aligned") for what in ("convert", "verify")
    ]
    assert all(float(row[3]) > 30 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_text_is_converted_and_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    printed = run("convert_text.py", twin_folder("text-8"), tmp_path / "out")
    assert "passed decoder_parity" in printed
    assert "FAILED" not in printed


def test_a_gemma_2_is_converted_and_verified(twin_folder: TwinFolder, tmp_path: Path) -> None:
    printed = run("convert_gemma2.py", twin_folder("gemma2-7-untied"), tmp_path / "out")
    assert printed.startswith("t5gemma with ")
    assert "passed cross_parity" in printed
    assert "FAILED" not in printed


def test_a_text_model_is_given_eyes_and_a_long_context(twin_folder: TwinFolder, tmp_path: Path) -> None:
    printed = run("convert_with_vision.py", twin_folder("text-8"), twin_folder("donor-wide"), tmp_path / "out")
    assert "residual of the aligned embedding tables" in printed
    assert "passed vision_parity" in printed
    assert "of both stacks was changed from 1.0 to 8.0" in printed
    assert "FAILED" not in printed


def test_a_deep_encoder_gets_a_shallow_decoder(twin_folder: TwinFolder, tmp_path: Path) -> None:
    printed = run("convert_unbalanced.py", twin_folder("images-13"), tmp_path / "out", "0:13:5")
    assert "the decoder takes 3 of its parent's 13 layers: 0, 5, 10" in printed
    assert "passed decoder_parity" in printed
    assert "passed encoder_parity" in printed
    assert "FAILED" not in printed
    found = inspect(tmp_path / "out").facts
    assert (found["encoder"]["num_hidden_layers"], found["decoder"]["num_hidden_layers"]) == (13, 3)


def test_a_decoder_comes_of_another_checkpoint(twin_folder: TwinFolder, tmp_path: Path) -> None:
    other = twin_folder("text-unlike-7")
    printed = run("convert_unbalanced.py", twin_folder("text-8"), tmp_path / "out", "first:6", other)
    assert "are the decoder's parent's byte for byte" in printed
    assert "the decoder's parent is computed with the source's embedding table" in printed
    assert "passed decoder_parity" in printed
    assert "FAILED" not in printed


def test_the_schedule_benchmark_prints_useful_work_and_documents() -> None:
    printed = run("benchmark_schedule.py", "--tokens", "20000000", "--batch-tokens", "262144")
    head, *rows = printed.splitlines()
    assert head.split() == ["length", "ranks", "useful", "passes", "documents", "singly", "seconds"]
    assert [row.split()[1] for row in rows] == ["1", "8", "64"] * 3
    for row in rows:
        _, ranks, useful, _, found, singly, _ = row.replace(",", "").split()
        assert 0 < float(useful.rstrip("%")) <= 100
        assert float(found) > 0.9 * float(singly)
        assert ranks != "1" or useful == "100.0%"


@pytest.mark.slow
def test_a_conversion_writes_after_a_text_and_after_a_picture(twin_folder: TwinFolder, tmp_path: Path) -> None:
    shutil.copytree(twin_folder("images-with-fill"), tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    write_processor(tmp_path / "source", side=56, tokens=4)
    convert(tmp_path / "source", tmp_path / "out")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    assert run("run_in_transformers.py", tmp_path / "out", "ab ab").endswith("\n")
    assert run("run_in_transformers.py", tmp_path / "out", "ab ab", tmp_path / "picture.png").endswith("\n")


def test_the_script_by_hand_gives_the_same_parameters(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_synthetic_source(source, find_map("gemma3").map, TEXT, seed=0)
    script = EXAMPLES / "convert_with_transformers.py"
    python([script, source, tmp_path / "out"], preload=Preload.TRANSFORMERS, check=True)
    found = inspect(tmp_path / "out").parameters
    assert found["encoder"] == found["decoder"] == inspect(source).parameters["decoder"]


def write_readable_source(folder: Path) -> None:
    """Return a twin with a tokenizer."""
    from tests.models.twins import BY_NAME, write_twin

    folder.mkdir()
    write_twin(BY_NAME["text-real-vocabulary"], folder)
    write_tokenizer(folder)


@pytest.mark.slow
def test_the_encoder_example_prints_text_similarity(tmp_path: Path) -> None:
    write_readable_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "whole")
    texts = ["the quick fox", "the quick dog", "over"]
    lines = run("extract_encoder.py", tmp_path / "whole", tmp_path / "encoder", *texts).splitlines()
    assert "passed encoder_parity - states under its own masks" in "\n".join(lines)
    rows = [line for line in lines if line.endswith(tuple(texts))]
    cosines = [[float(number) for number in row.split()[:3]] for row in rows]
    assert [round(row[place], 3) for place, row in enumerate(cosines)] == [1, 1, 1]
    assert cosines[0][1] < 1


@pytest.mark.slow
def test_an_embedding_model_is_trained_saved_and_measured(tmp_path: Path) -> None:
    # The tiny parent would not do: sentence-transformers reads its byte-level tokenizer as Gemma's.
    write_readable_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "encoder", part="encoder")
    options = ("--steps", "3", "--batch", "8", "--held-out", "20")
    printed = run("embedding.py", tmp_path / "encoder", tmp_path / "out", *options)
    # Random weights find little; that they were trained is what verify says.
    shares = [float(line.split()[-2].rstrip("%")) for line in printed.splitlines() if line.endswith("found")]
    assert len(shares) == 2
    assert all(0 <= share <= 100 for share in shares)
    report = verify(tmp_path / "out", tmp_path / "encoder")
    assert [(check.name, check.detail) for check in report.checks if not check.passed] == []
    assert report.passed
    assert (tmp_path / "out/modules.json").exists()


def test_code_is_paired_with_the_first_line_of_its_docstring() -> None:
    from embedding import pairs
    from tiny_parent.corpus import Document

    text = '''
@cached
def area(side):
    """Return the area of a square.

    More.
    """
    return side * side
def short():
    """Too short."""
    return 1
def empty():
    """Do nothing for ever and ever."""
'''
    found = list(pairs(Document("shapes.py", text)))
    assert found == [("Return the area of a square.", "def area(side):\n    return side * side")]
    assert list(pairs(Document("help/while", text))) == []


@pytest.mark.slow
def test_the_decoder_example_gives_the_source_back(tmp_path: Path) -> None:
    write_readable_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "whole")
    lines = run("extract_decoder.py", tmp_path / "whole", tmp_path / "back", "the quick").splitlines()
    assert any("passed decoder_parity - logits with hidden memory" in line for line in lines)
    weights = (tmp_path / "source/model.safetensors").read_bytes()
    assert (tmp_path / "back/model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_parent_is_trained_and_its_loss_falls(tiny_parent: Path) -> None:
    printed = (tiny_parent.parent / "said").read_text()
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if "held-out loss" in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(4096), abs=0.1)
    assert losses[2] < losses[1] < losses[0]


def test_the_trained_parent_is_taken_by_the_converter(tiny_parent: Path, tmp_path: Path) -> None:
    facts = inspect(tiny_parent).facts
    assert facts["sliding_window"] % 2 == 1
    assert {"full_attention", "sliding_attention"} == set(
        json.loads((tiny_parent / "config.json").read_text())["layer_types"]
    )
    convert(tiny_parent, tmp_path / "out")
    report = verify(tmp_path / "out", tiny_parent)
    assert report.passed
    assert [check.name for check in report.checks if not check.passed] == []


def test_no_text_contains_the_tokens_reserved_for_sentinels(tiny_parent: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_parent / "tokenizer.json"))
    text = "def f():\n    return '<unused4000>' + \"ÅΩ\""
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<unused4095>") == 4095
    assert [tokenizer.id_to_token(number) for number in range(4)] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert ids[0] == 2
    assert max(ids) < 4096 - 256
    assert tokenizer.decode(ids) == text


def test_the_corpus_is_the_same_each_time_and_holds_nothing_out_twice(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert run("tiny_parent/corpus.py", first) == run("tiny_parent/corpus.py", again) == ""
    names: dict[str, list[str]] = {}
    for part in ("training", "held-out"):
        text = (first / f"{part}.jsonl").read_bytes()
        assert text == (again / f"{part}.jsonl").read_bytes()
        names[part] = [json.loads(line)["name"] for line in text.splitlines()]
    assert not set(names["training"]) & set(names["held-out"])
    every = names["training"] + names["held-out"]
    assert {"abc.py", "help/while"} <= set(every)
    assert 19 * len(names["held-out"]) <= len(names["training"]) < 20 * (len(names["held-out"]) + 1)


SMALL_STUDY = (
    "--steps",
    "2",
    "--evaluations",
    "2",
    "--batch",
    "2",
    "--length",
    "32",
    "--samples",
    "8",
    "--documents",
    "4",
)


@pytest.mark.slow
def test_the_ablations_are_trained_evaluated_and_drawn(tiny_parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--models", "untied", "random", "--seeds", "0", "1", *SMALL_STUDY)
    printed = run("ablation/run.py", tiny_parent, out, *options)
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["untied", "random"]
    assert results["untied"]["difference_from_parent"] == 0
    assert results["untied"]["parameters"]["embedding"] == 2 * results["random"]["parameters"]["embedding"]
    for result in results.values():
        assert list(result["runs"]) == ["0", "1"]
        assert result["runs"]["0"]["training"] != result["runs"]["1"]["training"]
        for once in result["runs"].values():
            assert len(once["training"]) == 2
            assert [*once["held_out"]] == ["0", "1", "2"]
            for found in once["held_out"].values():
                assert len(found["tasks"]) == len(found["hidden_tasks"]) == 5
                assert found["gain"] == pytest.approx(found["hidden_loss"] - found["loss"])
            assert once["held_out"]["2"]["loss"] < once["held_out"]["0"]["loss"]
    encoder, decoder = (
        load_file(out / "random/model.safetensors")[f"model.{part}.layers.0.mlp.up_proj.weight"]
        for part in ("encoder", "decoder")
    )
    assert not torch.equal(encoder, decoder)
    picture, table = (out / "ablation.svg").read_bytes(), (out / "table.md").read_text()
    assert printed.endswith(f"{table}\n")
    assert b"untied" in picture
    assert f"| random | {results['random']['parameters']['embedding']:,} |" in table
    ends = [once["held_out"]["2"]["loss"] for once in results["untied"]["runs"].values()]
    # The standard error of two values is half their difference.
    assert f"{sum(ends) / 2:.3f} ± {abs(ends[0] - ends[1]) / 2:.3f}" in table
    for name in ("ablation.svg", "table.md"):
        (out / name).unlink()
    shutil.rmtree(out / "run-random-1")
    (out / "results.json").unlink()
    run("ablation/run.py", tiny_parent, out, *options)
    again = json.loads((out / "results.json").read_text())
    for name, result in results.items():
        for seed, once in result["runs"].items():
            assert again[name]["runs"][seed]["training"] == once["training"]
            assert again[name]["runs"][seed]["held_out"] == once["held_out"]
    run("ablation/report.py", out / "results.json", out)
    assert ((out / "ablation.svg").read_bytes(), (out / "table.md").read_text()) == (picture, table)


STUDIED = {
    "objective": ["ul2", "ul2-kd", "prefix-kd"],
    "start": ["keep", "norm-unit", "norm-0.1", "frozen-decoder", "every-other-layer", "first-half", "last-half"],
}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIED)
def test_studies_of_the_objective_and_of_the_start_begin_alike(study: str, tiny_parent: Path, tmp_path: Path) -> None:
    run("ablation/run.py", tiny_parent, tmp_path / "out", "--study", study, *SMALL_STUDY)
    results = json.loads((tmp_path / "out/results.json").read_text())
    first, *others = (result["runs"]["0"]["held_out"] for result in results.values())
    assert list(results) == STUDIED[study]
    # With the encoder hidden, each is the parent, unless its decoder has fewer layers; what it learns differs.
    for name, result in results.items():
        assert (result["difference_from_parent"] == 0) == (name not in STUDIED["start"][4:])
    for other in others:
        assert other["2"]["loss"] != first["2"]["loss"]
    if study == "objective":
        assert list(others[1]["0"]["tasks"]) == ["prefix"]


@pytest.mark.slow
def test_the_training_benchmark_measures_everyone(tmp_path: Path) -> None:
    options = ("--layers", "2", "--length", "64", "--steps", "3", "--rounds", "1", "--folder", tmp_path)
    rows = run("benchmark_training.py", "tiny", *options).splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["adapt", "trainer", "plain"]
    assert all(float(row.split()[1]) > 100 for row in rows)


@pytest.mark.slow
def test_the_start_benchmark_measures_the_memory_of_all_processes(tmp_path: Path) -> None:
    _, row = run("benchmark_start.py", "tiny", "--folder", tmp_path).splitlines()
    # Two interpreters with torch.
    assert float(row.split()[-2]) > 0.3
    assert list(tmp_path.iterdir()) == []
