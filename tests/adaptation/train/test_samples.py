"""The samples of a run: several corpora by weights, single documents, image steps filled by tokens, and the notes."""

import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from t5g2convert.adaptation.adapt import foresee
from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.pair_documents import PairDocument
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.forecast import forecast
from t5g2convert.adaptation.train.history import read_history
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.samples import shortest_text
from t5g2convert.adaptation.train.schedule import first_sample
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.adaptation.ul2.mixture import Mixture, Task, read_mixture
from t5g2convert.errors import DataError, UsageError
from tests.adaptation.trainings import changed, request_of, run, settings_of, steps_of, tensors_of


def samples_of_run(small: Path, data: Path, **changes: object) -> UL2Dataset:
    return prepare(small / "model", data, settings_of(**changes)).samples


def texts_of(samples: UL2Dataset, count: int) -> list[tuple[int, int, int, int]]:
    """Return the corpus, start, stop and task of the first text samples."""
    assert samples.sampler is not None
    return [(*samples.sampler.text(i), samples.sampler.task(i)) for i in range(count)]


@pytest.mark.parametrize("documents", ["packed", "single"])
def test_each_corpus_has_its_share_of_the_tokens(documents: str, small: Path, two_corpora: Path) -> None:
    samples = samples_of_run(small, two_corpora, documents=documents)
    assert samples.sampler is not None
    epochs = samples.sampler.epochs(1)
    count = int(3 / min(epochs))
    read: Counter[int] = Counter()
    for corpus, start, stop, _ in texts_of(samples, count):
        read[corpus] += stop - start
    # Single documents differ in length, and the last epoch is not complete.
    assert read[0] / sum(read.values()) == pytest.approx(0.75, abs=0.002 if documents == "packed" else 0.01)


def test_every_task_has_its_share_of_each_corpus(small: Path, two_corpora: Path) -> None:
    samples = samples_of_run(small, two_corpora)
    for count in (8, 64, 800):
        found = Counter((corpus, task) for corpus, _, _, task in texts_of(samples, count))
        for task, each in enumerate(samples.settings.mixture.tasks):
            blocks = count // 8
            assert found[0, task] + found[1, task] == blocks * each.weight
            # Less than one text for each slot of the mixture.
            assert abs(found[1, task] - Fraction(blocks * each.weight, 4)) < each.weight


@pytest.mark.parametrize("documents", ["packed", "single"])
def test_each_corpus_is_read_whole_in_each_of_its_epochs(documents: str, small: Path, two_corpora: Path) -> None:
    samples = samples_of_run(small, two_corpora, documents=documents)
    assert samples.sampler is not None
    found: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for corpus, start, stop, _ in texts_of(samples, int(2.2 / min(samples.sampler.epochs(1)))):
        found[corpus].append((start, stop))
    for texts in samples.sampler.texts:
        times = np.zeros(samples.corpora[texts.corpus].packed.tokens, int)
        for start, stop in found[texts.corpus][: 2 * texts.per_epoch]:
            times[start:stop] += 1
        if documents == "single":
            assert (times == 2).all()
        else:
            # Slots start an epoch nearly together, and the ends of the corpus are skipped.
            assert (times == 2).mean() > 0.99
            assert times.max() <= 3


def test_single_documents_are_never_joined(small: Path, two_corpora: Path) -> None:
    samples = samples_of_run(small, two_corpora, documents="single")
    ends = [np.concatenate([[0], corpus.ends]).astype(int) for corpus in samples.corpora]
    lengths = Counter()
    for i, (corpus, start, stop, task) in enumerate(texts_of(samples, 300)):
        document = int(np.searchsorted(ends[corpus], start, side="right"))
        assert stop <= ends[corpus][document]
        size = samples.size(0, i)
        example = samples.text(i)
        assert (len(example.encoder), len(example.labels), example.task) == (size.encoder, size.labels, task)
        assert size.encoder <= 64
        assert size.labels <= 64
        lengths[stop - start] += 1
    assert min(lengths) < 20 < samples.longest_raw == max(lengths)


def test_steps_of_single_documents_are_filled_by_tokens(small: Path, two_corpora: Path) -> None:
    prepared = prepare(small / "model", two_corpora, settings_of(documents="single", batch_tokens=4096, steps=20))
    settings = prepared.samples.settings
    assert settings.samples == settings.text_samples > 4096 // 64
    read = [prepared.samples.size(0, i).encoder for i in range(20 * settings.samples)]
    assert sum(read) / 20 == pytest.approx(4096, rel=0.05)
    assert any(note.startswith(f"a text step has {settings.samples} documents or pieces") for note in prepared.notes)
    found = forecast(prepared, devices=1, loop=LoopConfig())
    assert (found.documents, found.samples) == ("single", settings.samples)
    assert found.operations is not None
    assert {task.raw for task in found.tasks} == {prepared.samples.longest_raw}


def test_documents_too_short_for_a_task_are_skipped_or_refused(small: Path, two_corpora: Path) -> None:
    assert shortest_text(read_mixture(), 5000) == 2
    half = Mixture(tasks=(Task(name="half", kind="spans", rate=0.5, mean_span=1, weight=1),))
    with pytest.raises(UsageError, match=r"task 'half' cannot make spans of \d+ tokens, so documents cannot be cut"):
        samples_of_run(small, small / "data", mixture=half, documents="single")
    some = Mixture(tasks=(Task(name="some", kind="spans", rate=0.5, mean_span=1.1, weight=1),))
    # 7 tokens would be 4 spans of one token, with 3 tokens between them.
    assert shortest_text(some, 40) == 8
    prepared = prepare(small / "model", two_corpora, settings_of(mixture=some, documents="single"))
    short = sum(int((np.diff(corpus.ends, prepend=0) < 8).sum()) for corpus in prepared.samples.corpora)
    assert short
    assert f"{short:,} document(s) are shorter than the tasks need, and are not read" in prepared.notes
    assert min(prepared.samples.size(0, i).encoder for i in range(500)) >= 8


def test_image_steps_are_filled_by_tokens(small: Path) -> None:
    prepared = prepare(small / "model", small / "data", settings_of(image_every=2, steps=8))
    samples, settings = prepared.samples, prepared.samples.settings
    encoder = [samples.image_size(document).encoder for document in samples.corpora[0].packed.images]
    mean = sum(encoder) / len(encoder)
    assert settings.image_samples == int(256 / mean)
    assert [settings.samples_of(step) for step in range(4)] == [4, settings.image_samples] * 2
    assert first_sample(settings, 3) == settings.image_samples
    labels = [samples.image_size(document).labels for document in samples.corpora[0].packed.images]
    text = [samples.size(0, i) for i in range(8)]
    read = settings.image_samples * mean, settings.samples * sum(size.encoder for size in text) / 8
    written = (
        settings.image_samples * sum(labels) / len(labels),
        settings.samples * sum(size.labels for size in text) / 8,
    )
    expected = [f"{each[0] / sum(each):.1%}" for each in (read, written)]
    note = next(note for note in prepared.notes if note.startswith("an image step"))
    assert f"image steps have {expected[0]} of all encoder tokens and {expected[1]} of all labels" in note
    assert note.endswith("at the same learning rate")


def test_a_batch_smaller_than_a_document_has_one(small: Path) -> None:
    settings = settings_of(image_every=1, encoder_length=8, batch_tokens=8)
    samples = prepare(small / "model", small / "data", settings).samples
    assert samples.settings.image_samples == 1


def test_documents_with_images_come_from_the_corpora_that_have_them(
    small: Path, two_corpora: Path, tmp_path: Path
) -> None:
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack

    rows = (small / "texts/pictures.jsonl").read_text().splitlines()[:5]
    (small / "texts/five.jsonl").write_text("\n".join(rows))
    pack(small / "model", tmp_path / "pictures", read_files([small / "texts/five.jsonl"], "text", lambda _: None))
    (small / "texts/five.jsonl").unlink()
    path = tmp_path / "corpora.yaml"
    folder = two_corpora.parent
    path.write_text(
        f"corpora:\n- {{data: {folder}/one, weight: 1}}\n- {{data: {folder}/two, weight: 5}}\n"
        "- {data: pictures, weight: 3}\n"
    )
    samples = samples_of_run(small, path, image_every=2)
    assert samples.documents is not None
    assert samples.sampler is not None
    drawn = [samples.documents.document(i) for i in range(48)]
    assert Counter(corpus for corpus, _ in drawn) == {0: 12, 2: 36}
    assert sorted(number for corpus, number in drawn if corpus == 0) == list(range(12))
    assert Counter(number for corpus, number in drawn[:7] if corpus == 2).most_common(1)[0][1] <= 2
    # A corpus without text is left out of the text.
    assert [texts.corpus for texts in samples.sampler.texts] == [0, 1]
    assert {corpus for corpus, *_ in texts_of(samples, 100)} == {0, 1}
    with pytest.raises(DataError, match="pictures: the corpus has 0 tokens"):
        samples_of_run(small, tmp_path / "pictures")
    with pytest.raises(DataError, match="two: has no documents with images"):
        samples_of_run(small, folder / "two", image_every=2)


def test_notes_say_how_often_each_corpus_is_read(small: Path, two_corpora: Path) -> None:
    notes = prepare(small / "model", two_corpora, settings_of(steps=8000)).notes
    tokens = [f"{corpus.packed.tokens:,}" for corpus in Corpora.open(two_corpora)]
    one, two = notes
    assert one.startswith(f"one: {tokens[0]} text tokens, 75.0% of the text that is read; read ")
    assert two.startswith(f"two: {tokens[1]} text tokens, 25.0% of the text that is read; read ")
    assert two.endswith("times; more than 4 add little (arXiv 2305.16264)")
    assert prepare(small / "model", two_corpora, settings_of(steps=3)).notes[0].endswith(" times")
    (alone,) = prepare(small / "model", small / "data", settings_of(steps=30_000)).notes
    assert alone.startswith("the text is read ")
    assert not prepare(small / "model", small / "data", settings_of(steps=3)).notes
    request = replace(request_of(small, small / "no-run", settings_of(steps=8000)), data=two_corpora)
    found = foresee(request)
    assert [(corpus.name, corpus.share) for corpus in found.corpora] == [("one", 0.75), ("two", 0.25)]
    assert found.notes == notes
    assert f"read {found.corpora[1].epochs:.3g} times" in two


@pytest.mark.usefixtures("one_process")
def test_a_run_on_several_corpora_resumes_exactly_and_with_the_same_corpora_only(
    small: Path, two_corpora: Path, tmp_path: Path
) -> None:
    settings = settings_of(precision="float32", documents="single", image_every=3)
    request = replace(request_of(small, tmp_path / "run", settings), data=two_corpora)
    run(request)
    history = read_history(tmp_path / "run")
    corpora = Corpora.open(two_corpora)
    assert history.data == corpora.sha256
    assert [corpus.model_dump() for corpus in history.corpora] == corpora.to_json()
    assert history.settings.image_samples == 256 // 8
    assert history.settings.text_samples
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    outcome, steps = run(changed(request, resume=True))
    assert (outcome.start, [step.step for step in steps]) == (2, [3, 4])
    run(replace(request, run=tmp_path / "whole"))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    ours, theirs = (tensors_of(tmp_path / name, 4) for name in ("run", "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    other = tmp_path / "other.yaml"
    other.write_text(two_corpora.read_text().replace("data: ", f"data: {two_corpora.parent}/").replace("0.25", "0.5"))
    for data in (other, small / "data"):
        with pytest.raises(UsageError, match=r"cannot be resumed with these options: DATA 0\.75 of \w+ \+ 0\.25 of"):
            run(changed(replace(request, data=data), resume=True, change=True))


def test_image_steps_use_those_documents_and_no_others(small: Path) -> None:
    samples = samples_of_run(small, small / "data", image_every=1, steps=2)
    made = list(samples.order(LoopConfig(), rank=0, world=1))
    count = samples.settings.samples_of(0)
    numbers = sorted(i for place in made for i in place.samples)
    assert numbers == list(range(2 * count))
    assert all(samples.settings.kind_of(place.step) == "images" for place in made)


def test_pairs_are_for_finetune(small: Path, tmp_path: Path) -> None:
    pair = PairDocument("a", ("b",), ("c",))
    pack(small / "model", tmp_path / "pairs", [pair, pair], flush=False)
    with pytest.raises(DataError, match="pairs: has no text: it has 2 pairs, which t5g2 finetune trains on"):
        prepare(small / "model", tmp_path / "pairs", settings_of())
    shutil.copytree(small / "data", tmp_path / "both")
    pack(small / "model", tmp_path / "both", [pair], append=True, flush=False)
    (tmp_path / "corpora.yaml").write_text("corpora: [{data: pairs, weight: 1}, {data: both, weight: 1}]\n")
    for data, count in ((tmp_path / "both", 1), (tmp_path / "corpora.yaml", 3)):
        found = prepare(small / "model", data, settings_of())
        assert f"{count} pairs are not read: t5g2 finetune trains on them" in found.notes
    # The samples of the text do not change.
    both = samples_of_run(small, tmp_path / "both")
    assert texts_of(both, 40) == texts_of(samples_of_run(small, small / "data"), 40)
