"""Load a converted folder in transformers, and generate text from a prompt, with or without a picture.

    python examples/run_in_transformers.py FOLDER PROMPT [PICTURE]

A conversion has not yet learnt to use its encoder: do not expect sensible text until it is trained further.
"""

import sys
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline


def write_after_text(folder: Path, prompt: str) -> str:
    """Let the encoder read the prompt and the decoder write 20 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    written = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def write_after_picture(folder: Path, prompt: str, picture: Path) -> str:
    """Let the encoder read the picture and the prompt; <start_of_image> marks the position of the picture."""
    write = pipeline("image-text-to-text", model=str(folder))
    (answer,) = write(images=str(picture), text=f"<start_of_image> {prompt}", max_new_tokens=20, do_sample=False)
    return str(answer["generated_text"])


if __name__ == "__main__":
    place, text, *pictures = sys.argv[1:]
    print(
        write_after_picture(Path(place), text, Path(pictures[0])) if pictures else write_after_text(Path(place), text)
    )
