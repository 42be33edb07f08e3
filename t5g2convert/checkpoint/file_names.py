"""The names of the files in a checkpoint folder."""

from typing import Final

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
ADAPTER_FILE: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_RECORD: Final = "t5g2_adapter.json"
"""A file that peft ignores: the model and the training of an adapter that this tool trained."""

GENERATION_FILE: Final = "generation_config.json"

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
PIECES_FILE: Final = "tokenizer.model"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
ADDED_TOKENS_FILE: Final = "added_tokens.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
OLDER_TEMPLATE_FILE: Final = "chat_template.json"
PROCESSOR_FILE: Final = "processor_config.json"
PREPROCESSOR_FILE: Final = "preprocessor_config.json"

TOKENIZER_FILES: Final = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    PIECES_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    OLDER_TEMPLATE_FILE,
)
"""The files from which transformers reads a tokenizer, without the folder of additional chat templates."""


def weight_files(count: int) -> tuple[str, ...]:
    """Return the names of the weights of a model in `count` files, in order, as transformers names them.

    >>> weight_files(1)
    ('model.safetensors',)
    >>> weight_files(2)
    ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return (SINGLE_FILE,)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
