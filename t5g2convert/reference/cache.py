"""The key-value cache of one decoder layer: the encoder's output, then the decoder's own tokens."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer in one buffer, [memory | own tokens | free], which doubles when it is full.

    Merged attention reads both parts together; T5Gemma's two attentions read one part each.

    Args:
        room: The number of own tokens to reserve at the start.
    """

    def __init__(self, room: int = 0) -> None:
        self.length = 0
        self.memory_length = 0
        self._room = room
        self._buffer_2BKSD: Tensor | None = None

    @property
    def started(self) -> bool:
        """Whether the memory's keys and values were stored."""
        return self._buffer_2BKSD is not None

    def start(self, k_BKMD: Tensor, v_BKMD: Tensor) -> None:
        """Store the memory's keys and values."""
        batch, heads, tokens, width = k_BKMD.shape
        self._buffer_2BKSD = k_BKMD.new_empty((2, batch, heads, tokens + self._room, width))
        self._buffer_2BKSD[0, :, :, :tokens] = k_BKMD
        self._buffer_2BKSD[1, :, :, :tokens] = v_BKMD
        self.length = self.memory_length = tokens

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """The memory's keys and values."""
        assert self._buffer_2BKSD is not None, "start comes first"
        k_BKMD, v_BKMD = self._buffer_2BKSD[:, :, :, : self.memory_length]
        return k_BKMD, v_BKMD

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; return all keys and all values, the memory's first."""
        assert self._buffer_2BKSD is not None, "start comes first"
        end = self.length + k_BKTD.shape[2]
        if end > self._buffer_2BKSD.shape[3]:
            full = self._buffer_2BKSD
            self._buffer_2BKSD = full.new_empty((*full.shape[:3], max(end, 2 * full.shape[3]), full.shape[4]))
            self._buffer_2BKSD[:, :, :, : self.length] = full[:, :, :, : self.length]
        self._buffer_2BKSD[0, :, :, self.length : end] = k_BKTD
        self._buffer_2BKSD[1, :, :, self.length : end] = v_BKTD
        self.length = end
        k_BKSD, v_BKSD = self._buffer_2BKSD[:, :, :, :end]
        return k_BKSD, v_BKSD
