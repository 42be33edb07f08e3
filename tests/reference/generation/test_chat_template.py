import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from t5g2convert import CheckpointError, UsageError
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.reference.generation.chat_template import ChatTemplate
from tests.models.gemma_chat import TEMPLATE

OTHERS = (
    "{% for m in messages %}\n  {% if loop.first %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools is none }}",
    "{% for c in messages[0].content %}{% if c == 'x' %}{% break %}{% endif %}{{ c }}{% endfor %}{{ eos_token }}",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_demo_source(tmp_path / "demo")
    return tmp_path / "demo"


def set_setting(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("template", [TEMPLATE, *OTHERS])
@pytest.mark.parametrize("place", ["setting", "file", "named"])
def test_it_is_rendered_as_in_transformers(template: str, place: str, folder: Path) -> None:
    if place == "file":
        (folder / "chat_template.jinja").write_text(template)
        set_setting(folder, chat_template="not this one")
    else:
        named = [{"name": "default", "template": template}, {"name": "rag", "template": "no"}]
        set_setting(folder, chat_template=template if place == "setting" else named)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTemplate(folder)
    for prompt in ("Tell me, é", "a <b> & 'x' \"", " \n x "):
        for image in (False, True):
            content = [{"type": "image"}, {"type": "text", "text": prompt}] if image else prompt
            expected = theirs.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if not (image and template == OTHERS[2]):
                assert ours.render(prompt, image=image) == expected


def test_the_older_file_is_read(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert ChatTemplate(folder).render("a") == "a!"


def test_tokens_written_as_objects_are_read(folder: Path) -> None:
    set_setting(folder, bos_token={"content": "<s>", "special": True}, chat_template="{{ bos_token }}")
    assert ChatTemplate(folder).render("a") == "<s>"


@pytest.mark.parametrize("setting", [None, [{"name": "rag", "template": "x"}], 7])
def test_a_folder_without_a_template_is_refused(setting: Any, folder: Path) -> None:
    set_setting(folder, chat_template=setting)
    with pytest.raises(UsageError, match="has no chat template"):
        ChatTemplate(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", "the chat template fails: no system turns"),
        ("{% if %}", "the chat template fails"),
        ("{{ messages.append(1) }}", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_is_the_folders_fault(template: str, reason: str, folder: Path) -> None:
    set_setting(folder, chat_template=template)
    with pytest.raises(CheckpointError, match=reason):
        ChatTemplate(folder).render("a")
