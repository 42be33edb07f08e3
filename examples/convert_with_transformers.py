"""The same conversion by hand with transformers, for comparison: load, build on the meta device, assign, save.

    python examples/convert_with_transformers.py SOURCE OUTPUT

It is for text-only sources. It ties only what transformers ties, does not compute the end-of-image row, and checks
nothing.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from t5g2convert import plan


def main(source: Path, output: Path) -> None:
    """Read everything, give both stacks the same tensors, and write everything."""
    weights = {
        name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    config = T5Gemma2Config(**plan(source).config)
    with torch.device("meta"):
        model = T5Gemma2ForConditionalGeneration(config)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        rest = name.removeprefix("language_model.").removeprefix("model.")
        if rest == "embed_tokens.weight":
            tensor = tensor[: config.decoder.vocab_size]
            state["model.encoder.text_model.embed_tokens.weight"] = tensor
            state["model.decoder.embed_tokens.weight"] = tensor
            state["lm_head.out_proj.weight"] = tensor
        elif rest.startswith(("layers.", "norm.")):
            rest = rest.replace("input_layernorm", "pre_self_attn_layernorm")
            rest = rest.replace("post_attention_layernorm", "post_self_attn_layernorm")
            state[f"model.encoder.text_model.{rest}"] = tensor
            state[f"model.decoder.{rest}"] = tensor.clone()  # save_pretrained refuses shared storage
        else:
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            state[f"model.encoder.{name}"] = tensor
    for name, parameter in model.state_dict().items():
        if name not in state:
            state[name] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(output, max_shard_size="5GB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
