"""The five published sizes of Gemma 3: text settings, the vision tower, parameters after conversion."""

from collections.abc import Mapping
from typing import Any

FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SIZES: Mapping[str, tuple[int, ...]] = {
    "270m": (18, 640, 2048, 4, 1, 256),
    "1b": (26, 1152, 6912, 4, 1, 256),
    "4b": (34, 2560, 10240, 8, 4, 256),
    "12b": (48, 3840, 15360, 16, 8, 256),
    "27b": (62, 5376, 21504, 32, 16, 128),
}
TOTALS = {
    "270m": 786_029_296,
    "1b": 2_115_977_456,
    "4b": 7_508_928_880,
    "12b": 22_946_238_576,
    "27b": 53_031_784_048,
}
SIGLIP: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
