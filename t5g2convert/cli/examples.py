"""Example commands, for the help and the pages of the commands."""

from collections.abc import Mapping
from typing import Final

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "demo": ("t5g2 demo --out twin",),
    "inspect": ("t5g2 inspect gemma-3-4b-pt", "t5g2 inspect t5gemma-2-4b-4b --json"),
    "plan": ("t5g2 plan gemma-3-4b-pt --tensors --dtype float32",),
    "convert": ("t5g2 convert gemma-3-4b-pt my-t5gemma-2-4b-4b --max-shard-size 2GB --verify",),
    "extract": ("t5g2 extract t5gemma-2-4b-4b encoder-4b --part encoder",),
    "verify": ("t5g2 verify t5gemma-2-4b-4b --source gemma-3-4b-pt --html report.html --junit report.xml",),
    "average": ("t5g2 average run-4b t5gemma-2-4b-4b-adapted --model t5gemma-2-4b-4b --last 5",),
    "merge": ("t5g2 merge t5gemma-2-4b-4b adapter t5gemma-2-4b-4b-tuned",),
    "probe-sentinels": ("t5g2 probe-sentinels gemma-3-270m t5gemma-2-270m-trained",),
    "compare": ("t5g2 compare gemma-3-4b-pt t5gemma-2-4b-4b --text novel.txt --max-kl 0.1 --min-agreement 0.9",),
    "generate": (
        "t5g2 generate t5gemma-2-4b-4b --prompt 'an encoder-decoder' --max-new-tokens 8",
        "t5g2 generate t5gemma-2-4b-4b --hide-encoder --decoder-prompt 'a decoder' --max-new-tokens 8",
        "t5g2 generate t5gemma-2-4b-4b --prompt 'an encoder-decoder' --temperature 0.7 --seed 1 --json",
    ),
    "pack": ("t5g2 pack t5gemma-2-4b-4b packed novel.txt",),
    "adapt": ("t5g2 adapt t5gemma-2-4b-4b packed run --lr 1e-4 --steps 10000",),
    "finetune": ("t5g2 finetune t5gemma-2-4b-4b pairs run --lr 1e-5 --epochs 3",),
    "upload": ("t5g2 upload t5gemma-2-4b-4b your-name/t5gemma-2-4b-4b --dry-run",),
    "card": ("t5g2 card t5gemma-2-4b-4b --repo your-name/t5gemma-2-4b-4b --write",),
    "doctor": ("t5g2 doctor",),
    "mappings list": ("t5g2 mappings list",),
    "mappings show": ("t5g2 mappings show gemma3",),
    "mappings check": ("t5g2 mappings check gemma3 --against gemma-3-4b-pt",),
    "mappings schema": ("t5g2 mappings schema > weight-map.schema.json",),
}
"""The examples of each command; tests/project/test_docs.py runs them, except for those in NOT_RUN."""

NOT_RUN: Final[Mapping[str, str]] = {"adapt": "hours", "finetune": "hours", "upload": "network"}
"""Why the examples of these commands are not run: they train, or need the Hub."""
