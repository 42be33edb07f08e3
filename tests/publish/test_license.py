import pytest

from t5g2convert.errors import CheckpointError
from t5g2convert.publish.license import GEMMA_TERMS, license_text, read_license

FILES = "https://huggingface.co/org/name/blob/abc/"


def card(*lines: str) -> str:
    return "\n".join(["---", *lines, "---", "# Title"])


def test_without_a_card_nothing_is_known() -> None:
    found = read_license(None, FILES)
    assert (found.has_card, found.metadata, found.gemma) == (False, {}, False)
    text = license_text(found, None, from_source=False)
    assert "was not available" in text
    assert "Gemma" not in text


@pytest.mark.parametrize(
    "lines",
    [(), ("language: en",), ("license:",), ("license: null",), ("license: ''",), ("license: []",)],
    ids=["no-metadata", "other", "nothing", "null", "empty", "no-list"],
)
@pytest.mark.parametrize("more", [(), ("license_name: mine", "license_link: https://example.org")])
def test_a_card_without_a_license_gives_no_license(lines: tuple[str, ...], more: tuple[str, ...]) -> None:
    found = read_license(card(*lines, *more), FILES)
    assert (found.has_card, found.metadata) == (True, {})
    assert "names no license" in license_text(found, None, from_source=False)


def test_a_text_without_metadata_gives_no_license() -> None:
    assert read_license("# A model\n\nlicense: mit\n", FILES).metadata == {}


@pytest.mark.parametrize(
    ("lines", "metadata"),
    [
        (("license: mit",), {"license": "mit"}),
        (("license: gemma",), {"license": "gemma"}),
        (("license: 'no'",), {"license": "no"}),
        (("license: no",), {"license": "no"}),
        (("license: [mit, apache-2.0]",), {"license": ["mit", "apache-2.0"]}),
        (
            ("license: other", "license_name: x", "license_link: https://x.org/y"),
            {"license": "other", "license_name": "x", "license_link": "https://x.org/y"},
        ),
        (("license: other", "license_link: LICENSE"), {"license": "other", "license_link": f"{FILES}LICENSE"}),
        (
            ("license: other", "license_link: a/LICENSE.txt"),
            {"license": "other", "license_link": f"{FILES}a/LICENSE.txt"},
        ),
    ],
)
def test_the_license_is_the_card_s(lines: tuple[str, ...], metadata: dict[str, object]) -> None:
    assert read_license(card(*lines), FILES).metadata == metadata


@pytest.mark.parametrize(
    "link",
    ["../x", "/etc/passwd", "http://x.org", "javascript:alert(1)", "https://x.org/a b", "a//b", "x\\ny", "[a, b]"],
)
def test_a_link_to_another_site_is_replaced_by_a_note(link: str) -> None:
    found = read_license(card("license: other", f"license_link: {link}"), FILES)
    assert found.metadata == {"license": "other"}
    assert "is not included here" in license_text(found, "other", from_source=True)


def test_a_license_file_of_a_source_outside_the_hub_is_named() -> None:
    found = read_license(card("license: other", "license_link: LICENSE"), None)
    assert found.metadata == {"license": "other"}
    assert "`LICENSE`" in license_text(found, "other", from_source=True)


@pytest.mark.parametrize("value", ["{a: b}", "[[mit]]", "!x mit", "*x", "[{a: b}]"])
def test_an_invalid_license_is_refused(value: str) -> None:
    with pytest.raises(CheckpointError, match="license in the metadata is neither text nor a list of texts"):
        read_license(card(f"license: {value}"), FILES)


def test_an_oversized_license_is_refused() -> None:
    with pytest.raises(CheckpointError, match="more than 500 characters"):
        read_license(card(f"license: {'x' * 501}"), FILES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (card("license: gemma"), True),
        (card("license: other", "license_name: Gemma Terms of Use"), True),
        (card("license: other", f"license_link: {GEMMA_TERMS}"), True),
        (card("license: mit") + f"\nThe weights are under [terms]({GEMMA_TERMS}).", True),
        (card("license: mit", "base_model: google/gemma-3-4b-pt"), False),
        (card("language: en"), False),
    ],
)
def test_gemma_s_terms_are_named_where_the_source_names_them(text: str, named: bool) -> None:
    found = read_license(text, FILES)
    assert found.gemma == named
    assert (GEMMA_TERMS in license_text(found, None, from_source=True)) == named


def test_control_characters_are_escaped() -> None:
    found = read_license(card('license: "a\\nb\\e[31m\\u202e"'), FILES)
    assert found.metadata == {"license": "a\\nb\\x1b[31m\\u202e"}
