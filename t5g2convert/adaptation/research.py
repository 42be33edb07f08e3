"""A small research model: what the paper's ablations compare (arXiv 2512.14856), made of the reference's blocks.

It is trained as transformers' T5Gemma2ForConditionalGeneration is: `model.model(...)` gives the decoder's last hidden
states, `model.lm_head(...)` logits of them, and every parameter has the name of its tensor on disk. Tied, merged and in
all layers it computes what a T5Gemma 2 computes of text. `checkpoint.research` tells what the forms are.

Hiding the encoder: merged attention under a mask of zeros is the decoder's own self-attention. The softmax of a
cross-attention has nothing left then; the attention is left out, and the layer is its parent's.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t5g2convert.checkpoint.families.research import Research, read_research, research_tensors
from t5g2convert.checkpoint.families.text_stack import LayerType
from t5g2convert.checkpoint.folder import open_checkpoint, some
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.cross_attention import CrossDecoderLayer
from t5g2convert.reference.layers import DecoderLayer, EncoderLayer, RMSNorm, StackLayer
from t5g2convert.reference.masks import bidirectional, causal, memory
from t5g2convert.reference.rope import Rotation, rotation
from t5g2convert.reference.settings import Kernel, TextSettings, research_text
from t5g2convert.reference.weights import Weights


class States(NamedTuple):
    """What `ResearchModel.model` gives, each [B, T, C]."""

    last_hidden_state: Tensor
    encoder_last_hidden_state: Tensor


class TextStack(nn.Module):
    """An embedding table, layers and a norm.

    Args:
        settings: What the config says of the stack.
        layers: Its layers.
    """

    def __init__(self, settings: TextSettings, layers: list[StackLayer]) -> None:
        super().__init__()
        self.settings = settings
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.recomputes = False

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Scaled embeddings, [B, T, C]: the scale is rounded to their dtype, then the product."""
        rows_BTC = self.embed_tokens(ids_BT)
        return rows_BTC * torch.tensor(self.settings.hidden_size**0.5).to(rows_BTC)

    def rotations(self, tokens: int, like: Tensor) -> dict[LayerType, Rotation]:
        """Rotations of the first positions, by kind of layer."""
        settings, positions = self.settings, torch.arange(tokens, device=like.device)
        return {
            kind: rotation(settings.ropes[kind], settings.head_dim, positions, like.dtype)
            for kind in set(settings.layer_types)
        }

    def forward(
        self,
        ids_BT: Tensor,
        masks: Mapping[LayerType, Tensor],
        memories: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> Tensor:
        """Normed states, [B, T, C].

        Args:
            ids_BT: Token ids, int64.
            masks: What own tokens may see of each other, by kind of layer.
            memories: By layer the encoder's output and what may be seen of it, where the layer reads it.
        """
        x_BTC = self.embed(ids_BT)
        rotations = self.rotations(ids_BT.shape[1], x_BTC)
        for number, (layer, kind) in enumerate(zip(self.layers, self.settings.layer_types, strict=True)):
            read = None if memories is None else memories[number]
            arguments = (x_BTC, rotations[kind], masks[kind], *(read or ()))
            if self.recomputes and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BTC = layer(*arguments)
        return self.norm(x_BTC)


class ResearchStacks(nn.Module):
    """Encoder and decoder, without the softmax.

    Args:
        model: Its config.
        kernel: How attention is computed.
    """

    def __init__(self, model: Research, kernel: Kernel) -> None:
        super().__init__()
        self.form = model.form
        self.reads_encoder = [model.reads_encoder(layer) for layer in range(model.decoder.num_hidden_layers)]
        encoder, decoder = (research_text(stack) for stack in (model.encoder, model.decoder))
        self.encoder = TextStack(encoder, [EncoderLayer(encoder, kernel) for _ in encoder.layer_types])
        own = CrossDecoderLayer if model.form.attention == "separate" else DecoderLayer
        self.decoder = TextStack(
            decoder, [(own if reads else EncoderLayer)(decoder, kernel) for reads in self.reads_encoder]
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
    ) -> States:
        """What the decoder makes of its tokens and the encoder's.

        Args:
            input_ids: Token ids of the encoder, [B, E].
            attention_mask: 0 at its padding, [B, E]; 0 everywhere hides its output.
            decoder_input_ids: Token ids of the decoder, [B, D].
            decoder_attention_mask: 0 at its padding, [B, D]; None for none.

        Raises:
            ValueError: Separate attention, and the encoder is hidden from some samples of the batch alone.
        """
        seen_BM = attention_mask.bool()
        kept_BD = (
            torch.ones_like(decoder_input_ids, dtype=torch.bool)
            if decoder_attention_mask is None
            else decoder_attention_mask.bool()
        )
        memory_BMC = self.encoder(input_ids, _masks(self.encoder.settings, bidirectional, seen_BM))
        reading = None
        if self._is_read(seen_BM):
            reading = memory_BMC, memory(decoder_input_ids.shape[1], seen_BM)
        memories = [reading if reads else None for reads in self.reads_encoder]
        states_BDC = self.decoder(decoder_input_ids, _masks(self.decoder.settings, causal, kept_BD), memories)
        return States(states_BDC, memory_BMC)

    def _is_read(self, seen_BM: Tensor) -> bool:
        """Whether layers are given the encoder's output; those with one softmax over all are, even if it is hidden."""
        if self.form.attention == "merged":
            return True
        read_B = seen_BM.any(-1)
        if bool(read_B.any()) and not bool(read_B.all()):
            raise ValueError("expected the encoder of all samples of a batch hidden, or of none")
        return bool(read_B.all())


class ResearchModel(nn.Module):
    """A research model; its parameters are called as its tensors.

    Attributes:
        model: Encoder and decoder.
        lm_head: The softmax's matrix, which is the decoder's table. A softcap of the logits is left to the caller, as
            in transformers.

    Args:
        model: Its config.
        kernel: How attention is computed; `eager` is that which equalities are stated for.
    """

    def __init__(self, model: Research, *, kernel: Kernel = "sdpa") -> None:
        super().__init__()
        self.model = ResearchStacks(model, kernel)
        self.lm_head = nn.Linear(model.decoder.hidden_size, model.decoder.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let what is one tensor on disk be one parameter."""
        if self.model.form.tied:
            self.model.decoder.embed_tokens.weight = self.model.encoder.embed_tokens.weight
        self.lm_head.weight = self.model.decoder.embed_tokens.weight

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep the inputs of layers alone for the backward pass, which computes the rest again."""
        self.model.encoder.recomputes = self.model.decoder.recomputes = True


def load(folder: Path, *, kernel: Kernel = "sdpa", dtype: torch.dtype = torch.float32) -> ResearchModel:
    """The research model of a folder, to be trained.

    Args:
        folder: A conversion by one of the maps in mappings/ablation, or an export of one.
        kernel: How attention is computed.
        dtype: Of the parameters.

    Raises:
        CheckpointError: Another model, or its tensors are not those that its config implies.
    """
    checkpoint_read = open_checkpoint(folder)
    settings = read_research(checkpoint_read.config, folder / "config.json")
    names = [item.name for item in research_tensors(checkpoint_read.config, folder / "config.json")]
    if strangers := sorted(checkpoint_read.tensors.keys() - set(names)):
        raise CheckpointError(f"has tensors that its config does not imply: {some(strangers)}", where=folder)
    weights = Weights(checkpoint_read, dtype=dtype)
    with torch.device("meta"):
        model = ResearchModel(settings, kernel=kernel)
    parameters = dict(model.named_parameters())
    for name in names:
        if (found := weights.shape(name)) != (expected := tuple(parameters[name].shape)):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(found)}, its config implies {list(expected)}", where=folder
            )
    # What is tied is named once, and so is missing under its other names.
    model.load_state_dict({name: weights.tensor(name) for name in names}, assign=True, strict=False)
    model.tie()
    return model


def _masks(
    settings: TextSettings, make: Callable[[LayerType, int, Tensor], Tensor], kept_BT: Tensor
) -> dict[LayerType, Tensor]:
    """A stack's masks. A token that would see nothing is padding, or of an encoder that is hidden, and sees everything:
    nobody reads what it computes, and no kernel divides by nothing."""
    masks = {kind: make(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}
    return {kind: seen | ~seen.any(-1, keepdim=True) for kind, seen in masks.items()}
