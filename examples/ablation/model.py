"""The research model of T5Gemma 2's ablations (arXiv 2512.14856), built from the blocks of `t5g2convert.reference`.

It is trained like transformers' T5Gemma2ForConditionalGeneration: `model.model(...)` returns the decoder's last hidden
states, `model.lm_head(...)` their logits, and every parameter has the name of its tensor on disk. The variant that is
tied and merged in all layers computes the same as a T5Gemma 2 from text. See `config` for the variants.

With the encoder hidden, merged attention is the decoder's self-attention. A cross-attention would have nothing to
normalize over, so it is skipped, and the layer computes the same as the parent's layer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablation.config import MODEL_TYPE, ResearchConfig, read_research, research_settings, research_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t5g2convert.adaptation.train.model import MODEL_BUILDERS, names_on_disk
from t5g2convert.adaptation.train.sharding import load_values, parameters_on_meta
from t5g2convert.checkpoint.families.registry import TARGETS, TargetFamily
from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.text_and_vision import TextConfig
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.attention import Kernel, Rotation, rotation
from t5g2convert.reference.layers import DecoderLayer, EncoderLayer, RMSNorm, StackLayer
from t5g2convert.reference.masks import bidirectional, causal, memory
from t5g2convert.reference.t5gemma import CrossDecoderLayer
from t5g2convert.reference.weights import Weights


def register() -> None:
    """Let t5g2convert convert to, inspect and train research models, in this process."""
    TARGETS[MODEL_TYPE] = TargetFamily(
        research_tensors, {"encoder": "encoder.", "decoder": "decoder."}, research_settings, read_research
    )
    MODEL_BUILDERS[MODEL_TYPE] = build


class States(NamedTuple):
    """The result of `ResearchModel.model`, each [B, T, C]."""

    last_hidden_state: Tensor
    encoder_last_hidden_state: Tensor


class TextStack(nn.Module):
    """An embedding table, layers and a norm.

    Args:
        settings: The stack's settings.
        layers: Its layers.
    """

    def __init__(self, settings: TextConfig, layers: list[StackLayer]) -> None:
        super().__init__()
        self.settings = settings
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.recomputes = False

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return scaled embeddings, [B, T, C]; the scale is rounded to their dtype before the product."""
        rows_BTC = self.embed_tokens(ids_BT)
        return rows_BTC * torch.tensor(self.settings.hidden_size**0.5).to(rows_BTC)

    def rotations(self, tokens: int, like: Tensor) -> dict[LayerType, Rotation]:
        """Return the rotations of the first positions, by kind of layer."""
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
        """Return normed states, [B, T, C].

        Args:
            ids_BT: Token ids, int64.
            masks: Which tokens of the stack each token may see, by kind of layer.
            memories: For each layer, the encoder's output and its mask; None if the layer does not attend to it.
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
        kernel: The attention kernel.
    """

    def __init__(self, model: ResearchConfig, kernel: Kernel) -> None:
        super().__init__()
        self.variant = model.variant
        self.reads_encoder = [model.reads_encoder(layer) for layer in range(model.decoder.num_hidden_layers)]
        encoder, decoder = model.encoder, model.decoder
        self.encoder = TextStack(encoder, [EncoderLayer(encoder, kernel) for _ in encoder.layer_types])
        separate = partial(CrossDecoderLayer, memory_size=encoder.hidden_size)
        own = separate if model.variant.attention == "separate" else DecoderLayer
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
        """Run both stacks.

        Args:
            input_ids: Token ids of the encoder, [B, E].
            attention_mask: 0 at the encoder's padding, [B, E]; all zeros hide the encoder's output.
            decoder_input_ids: Token ids of the decoder, [B, D].
            decoder_attention_mask: 0 at the decoder's padding, [B, D]; None where there is no padding.

        Raises:
            ValueError: Attention is separate, and the encoder is hidden from only some samples of the batch.
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
        """Return whether layers get the encoder's output; layers with merged attention do, even if it is masked."""
        if self.variant.attention == "merged":
            return True
        read_B = seen_BM.any(-1)
        if bool(read_B.any()) and not bool(read_B.all()):
            raise ValueError("expected the encoder to be hidden from all samples of a batch, or from none")
        return bool(read_B.all())


class ResearchModel(nn.Module):
    """A research model; its parameters have the names of its tensors.

    Attributes:
        model: Encoder and decoder.
        lm_head: The softmax's matrix, which is the decoder's table. The caller applies the softcap of the logits, as
            with transformers.

    Args:
        model: Its config.
        kernel: The attention kernel; exact equalities hold for `eager`.
    """

    def __init__(self, model: ResearchConfig, *, kernel: Kernel = "sdpa") -> None:
        super().__init__()
        self.model = ResearchStacks(model, kernel)
        self.lm_head = nn.Linear(model.decoder.hidden_size, model.decoder.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Share one parameter where there is one tensor on disk."""
        if self.model.variant.tied:
            self.model.decoder.embed_tokens.weight = self.model.encoder.embed_tokens.weight
        self.lm_head.weight = self.model.decoder.embed_tokens.weight

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep only the inputs of layers for the backward pass, which recomputes the rest."""
        self.model.encoder.recomputes = self.model.decoder.recomputes = True


def build(folder: Path, *, kernel: Kernel = "sdpa") -> ResearchModel:
    """Build a research model without its values.

    Args:
        folder: A conversion by one of the maps in examples/ablation/maps.
        kernel: The attention kernel.

    Raises:
        CheckpointError: The folder holds another model.
    """
    return ResearchModel(read_research(open_checkpoint(folder).config, folder / "config.json"), kernel=kernel)


def load(folder: Path, *, kernel: Kernel = "sdpa") -> ResearchModel:
    """Load a research model, float32.

    Args:
        folder: A conversion by one of the maps in examples/ablation/maps.
        kernel: The attention kernel.

    Raises:
        CheckpointError: The folder holds another model, or its tensors do not match its config.
    """
    checkpoint_read = open_checkpoint(folder)
    with parameters_on_meta():
        model = build(folder, kernel=kernel)
    load_values(model, names_on_disk(model, checkpoint_read), Weights(checkpoint_read), torch.device("cpu"))
    return model


def _masks(
    settings: TextConfig, make: Callable[[LayerType, int, Tensor], Tensor], kept_BT: Tensor
) -> dict[LayerType, Tensor]:
    """Return a stack's masks, by kind of layer.

    A token that may see nothing is padding or belongs to a hidden encoder. It may see everything instead: its result is
    not used, and kernels do not divide by zero.
    """
    masks = {kind: make(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}
    return {kind: seen | ~seen.any(-1, keepdim=True) for kind, seen in masks.items()}
