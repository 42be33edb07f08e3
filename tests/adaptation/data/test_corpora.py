"""Lists of corpora: what they accept, what they refuse, and the identity of the data."""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from t5g2convert.adaptation.data.corpora import Corpora, folders_of
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.errors import DataError, MappingError

LIST = "corpora:\n  - {data: one, weight: 0.7}\n  - {data: sub/two, weight: 0.1}\n"


@pytest.fixture
def listed(small: Path, tmp_path: Path) -> Path:
    """A list of two corpora in its own folder; the second has no images."""
    shutil.copytree(small / "data", tmp_path / "one")
    (tmp_path / "sub").mkdir()
    pack(small / "model", tmp_path / "sub/two", read_files([small / "texts/inspect.txt"], "text", lambda _: None))
    path = tmp_path / "corpora.yaml"
    path.write_text(LIST)
    return path


def test_folders_are_relative_to_the_file_and_weights_are_exact(listed: Path) -> None:
    corpora = Corpora.open(listed)
    assert [corpus.name for corpus in corpora] == ["one", "sub/two"]
    assert corpora.shares == (Fraction(7, 8), Fraction(1, 8))
    assert folders_of(listed) == (listed.parent / "one", listed.parent / "sub/two")
    assert corpora.tokens == corpora[0].packed.tokens + corpora[1].packed.tokens
    assert [len(corpus.ends) for corpus in corpora] == [2, 1]
    assert all(int(corpus.ends[-1]) == corpus.packed.tokens for corpus in corpora)


def test_a_folder_is_one_corpus_with_the_identity_of_its_index(listed: Path) -> None:
    one = listed.parent / "one"
    corpora = Corpora.open(one)
    assert (len(corpora), corpora.shares, folders_of(one)) == (1, (Fraction(1),), (one,))
    assert corpora.sha256 == corpora[0].packed.sha256
    listed.write_text("corpora: [{data: one, weight: 3}]\n")
    assert Corpora.open(listed).sha256 == corpora.sha256
    assert corpora.to_json() == [{"data": "one", "sha256": corpora.sha256, "weight": 1.0}]


def test_the_identity_depends_on_data_and_shares_only(listed: Path) -> None:
    before = Corpora.open(listed).sha256
    for text, is_same in (
        (LIST.replace("0.7", "7").replace("0.1", "1"), True),
        (LIST.replace("0.7", "0.6"), False),
        (LIST.replace("one", "two").replace("sub/two", "one").replace("two", "sub/two"), False),
    ):
        listed.write_text(text)
        assert (Corpora.open(listed).sha256 == before) == is_same
    (listed.parent / "moved").symlink_to(listed.parent / "one")
    listed.write_text(LIST.replace("one", "moved"))
    assert Corpora.open(listed).sha256 == before


@pytest.mark.parametrize(
    ("found", "instead", "reason", "line"),
    [
        ("weight: 0.7", "weight: 0", "weight: Input should be greater than or equal to 0.000001", 2),
        ("weight: 0.7", "weight: -1", "weight: Input should be greater than or equal to 0.000001", 2),
        ("weight: 0.7", "weight: 1e7", "weight: Input should be less than or equal to 1000000", 2),
        ("weight: 0.7", "weight: many", "weight: Input should be a valid number", 2),
        ("weight: 0.7", "weight: .inf", "weight: ", 2),
        (", weight: 0.7", "", "weight: Field required", 2),
        ("weight: 0.7", "wieght: 0.7", "unknown key 'wieght'", 2),
        ("corpora:", "corpus:", "unknown key 'corpus'", 1),
        ("data: sub/two", "data: one", "'one' is listed twice", 2),
        ("data: one", "data: ''", "data: String should match pattern", 2),
        ("data: one", 'data: "a\\e[2J"', "data: String should match pattern", 2),
        (LIST, "corpora: []", "corpora: Tuple should have at least 1 item", 1),
        (LIST, f"format: 2\n{LIST}", "format: Input should be 1", 1),
    ],
)
def test_a_fault_is_reported_with_its_position(
    found: str, instead: str, reason: str, line: int, tmp_path: Path
) -> None:
    path = tmp_path / "corpora.yaml"
    path.write_text(LIST.replace(found, instead, 1))
    for read in (Corpora.open, folders_of):
        with pytest.raises(MappingError) as raised:
            read(path)
        assert reason in raised.value.message
        assert str(raised.value.where).startswith(f"{path}:{line}:")


def test_a_missing_folder_and_equal_data_are_refused(listed: Path) -> None:
    listed.write_text(LIST.replace("sub/two", "sub/three"))
    with pytest.raises(DataError, match=r"sub/three/index\.json: is missing"):
        Corpora.open(listed)
    (listed.parent / "copy").symlink_to(listed.parent / "one")
    listed.write_text(LIST.replace("sub/two", "copy"))
    with pytest.raises(DataError, match="one and copy have the same data"):
        Corpora.open(listed)


def test_every_corpus_must_fit_the_model_and_have_its_bytes(listed: Path, small: Path) -> None:
    corpora = Corpora.open(listed)
    corpora.check_tokenizer(small / "model")
    for part in range(3):
        corpora.check_bytes(part=part, parts=3)
    path = listed.parent / "sub/two/text-00000.bin"
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="modified after packing"):
        corpora.check_bytes(part=0, parts=1)
    index = listed.parent / "sub/two/index.json"
    index.write_text(index.read_text().replace(corpora[1].packed.tokenizer_sha256, "a" * 64))
    with pytest.raises(DataError, match="sub/two: was packed with the tokenizer aaaaaaaaaaaaaaaa"):
        Corpora.open(listed).check_tokenizer(small / "model")
