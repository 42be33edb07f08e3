"""The chat template of Gemma 3, and the demo's model with the tokens that it needs."""

import json
from pathlib import Path
from typing import Final

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source

TEMPLATE: Final = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

START_OF_TURN, END_OF_TURN, LINE = 200, 201, 202


def write_chat_model(folder: Path) -> Path:
    """Write the demo's T5Gemma 2 to `folder/model`, with Gemma 3's chat template and tokens for it and for line breaks.

    The tokens 200 to 202 are `<start_of_turn>`, `<end_of_turn>` and a line break; the other tokens are single
    characters and those of the demo.
    """
    source = folder / "source"
    build_demo_source(source)
    path = source / "tokenizer.json"
    document = json.loads(path.read_text())
    names = {START_OF_TURN: "<start_of_turn>", END_OF_TURN: "<end_of_turn>", LINE: "\n"}
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {names.get(token, name): token for name, token in vocabulary.items()}
    entry = document["added_tokens"][0]
    for token in (START_OF_TURN, END_OF_TURN):
        document["added_tokens"].append({**entry, "id": token, "content": names[token]})
    document["added_tokens"].sort(key=lambda each: each["id"])
    path.write_text(json.dumps(document, ensure_ascii=False))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    convert(source, folder / "model", flush=False)
    return folder / "model"
