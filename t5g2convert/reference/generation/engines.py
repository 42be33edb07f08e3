"""What runs a model to generate: the reference pass, or transformers' class, behind one interface."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.encoder_decoder import EncoderDecoder

Steps = Callable[[Tensor], Tensor]
"""Takes the decoder's next tokens, [B, T], int64; returns the logits after the last of them, [B, V]."""


class Engine(Protocol):
    """A model that encodes once and then decodes step by step, with caches."""

    def start(self, ids_BM: Tensor, kept_BM: Tensor, pixels: Tensor | None = None, *, room: int = 0) -> Steps:
        """Encode a batch; return the steps of its decoding.

        Args:
            ids_BM: The encoder's input, int64.
            kept_BM: False at the padding of `ids_BM`.
            pixels: The images of the batch, in order.
            room: The number of tokens that the decoder will probably read.
        """

    def start_hidden(self, batch: int, *, room: int = 0) -> Steps:
        """Return the steps of a decoding that does not see the encoder."""


class ReferenceEngine:
    """The reference pass.

    Args:
        model: The model; `resident` makes it fast.
    """

    def __init__(self, model: EncoderDecoder) -> None:
        self._model = model

    def start(self, ids_BM: Tensor, kept_BM: Tensor, pixels: Tensor | None = None, *, room: int = 0) -> Steps:
        """Encode a batch; return the steps of its decoding."""
        vision = self._model.vision
        features_ITC = None if pixels is None or vision is None else vision.features(pixels)
        return self._steps(self._model.encode(ids_BM, kept_BM, features_ITC), kept_BM, room)

    def start_hidden(self, batch: int, *, room: int = 0) -> Steps:
        """Return the steps of a decoding that does not see the encoder: one memory token, which is hidden."""
        weights = self._model.weights
        states = self._model.encoder.embed(torch.zeros(batch, 1, dtype=torch.int64, device=weights.device))
        return self._steps(torch.zeros_like(states), torch.zeros(states.shape[:2], dtype=torch.bool), room)

    def _steps(self, memory_BMC: Tensor, kept_BM: Tensor, room: int) -> Steps:
        model, batch, read = self._model, memory_BMC.shape[0], 0
        caches = [LayerCache(room) for _ in range(len(model.decoder))]
        kept_BM = kept_BM.to(memory_BMC.device)

        def step(ids_BT: Tensor) -> Tensor:
            nonlocal read
            read += ids_BT.shape[1]
            kept_BS = torch.ones(batch, read, dtype=torch.bool, device=ids_BT.device)
            states_BTC = model.decode(ids_BT, kept_BS, memory_BMC, kept_BM, caches)
            return model.decoder.logits(states_BTC[:, -1])

        return step


class TransformersEngine:
    """transformers' class of a folder.

    Args:
        folder: The model's folder.
        name: The class in transformers.
        dtype: The dtype to compute in.
        device: The device to compute on.

    Raises:
        CheckpointError: The folder does not load completely.
        UsageError: transformers is not installed.
    """

    def __init__(self, folder: Path, name: str, *, dtype: torch.dtype, device: str) -> None:
        try:
            self._library: Any = import_module("transformers")
        except ImportError as error:
            raise UsageError(
                f"--engine transformers needs transformers: {error}",
                hint="pip install '.[adapt]' in the folder of t5g2convert's source",
            ) from None
        self._library.utils.logging.disable_progress_bar()
        try:
            model, found = getattr(self._library, name).from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except Exception as error:  # noqa: BLE001 - transformers raises whatever its loaders raise
            raise_interruption()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"does not load in transformers: {reason}", where=folder) from None
        if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
            raise CheckpointError(f"does not load in transformers: {len(wrong)} tensors do not fit", where=folder)
        self._model, self._device, self._dtype = model.eval().to(device), device, dtype
        # transformers 5.24 renamed the argument.
        parameters = signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def start(self, ids_BM: Tensor, kept_BM: Tensor, pixels: Tensor | None = None, *, room: int = 0) -> Steps:
        """Encode a batch; return the steps of its decoding."""
        images = {} if pixels is None else {"pixel_values": pixels}
        encoder = self._model.get_encoder()
        states_BMC = encoder(input_ids=ids_BM, attention_mask=kept_BM.long(), **images).last_hidden_state
        return self._steps(states_BMC, kept_BM)

    def start_hidden(self, batch: int, *, room: int = 0) -> Steps:
        """Return the steps of a decoding that does not see the encoder: one memory token, which is hidden."""
        width = self._model.config.decoder.hidden_size
        states_BMC = torch.zeros(batch, 1, width, dtype=self._dtype, device=self._device)
        return self._steps(states_BMC, torch.zeros(batch, 1, dtype=torch.bool, device=self._device))

    def _steps(self, states_BMC: Tensor, kept_BM: Tensor) -> Steps:
        library, model = self._library, self._model
        cache = library.EncoderDecoderCache(
            library.DynamicCache(config=model.config.get_text_config(decoder=True)), library.DynamicCache()
        )
        given = {
            "encoder_outputs": import_module("transformers.modeling_outputs").BaseModelOutput(states_BMC),
            "attention_mask": kept_BM.long(),
            "use_cache": True,
            self._cache_name: cache,
        }

        def step(ids_BT: Tensor) -> Tensor:
            logits_BTV: Tensor = model(decoder_input_ids=ids_BT, logits_to_keep=1, **given).logits
            return logits_BTV[:, -1]

        return step
