"""A directory that appears when it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
# Types of what an import reads of config.json.
_COUNTS = (
    "first_k_dense_replace", "head_dim", "hidden_size", "intermediate_size",
    "max_position_embeddings", "moe_intermediate_size", "moe_k", "moe_layer_end_index",
    "moe_layer_interval", "moe_layer_start_index", "moe_num_experts", "moe_num_shared_experts",
    "n_group", "n_routed_experts", "n_shared_experts", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "topk_group", "vocab_size",
)  # fmt: skip
# -1 stands for the last layer.
_LEAST = {"moe_layer_end_index": -1, "moe_layer_interval": 1}
_OPTIONAL = ("head_dim", "num_key_value_heads", "rope_parameters", "rope_scaling")
_NUMBERS = ("initializer_range", "rms_norm_eps", "rope_theta", "routed_scaling_factor")
_SWITCHES = (
    "attention_bias", "norm_topk_prob", "tie_word_embeddings", "use_bias", "use_qk_norm",
)  # fmt: skip
_OBJECTS = ("rope_parameters", "rope_scaling")


def check_free(path: Path) -> None:
    """Refuse a directory that cannot be made, before the work begins.

    Raises:
        ValueError: it is there, or its parent is no directory that can be written.
    """
    above = path.absolute().parent
    if path.exists() or path.is_symlink():
        raise ValueError(f"--output {path} exists; name a new directory, or remove it")
    if not above.is_dir():
        raise ValueError(f"--output {path}: {above} is no directory; make it, or name another one")
    if not os.access(above, os.W_OK):
        raise ValueError(f"--output {path}: no permission to write there; name another one")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a new directory beside ``path``, and rename it to ``path`` if the block succeeds.

    After an error the directory is removed. If the process is killed it stays, under a hidden name
    that contains "incomplete".
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.incomplete-", dir=path.absolute().parent))
    try:
        yield partial
        # mkdtemp, and safetensors, let nobody else in.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        for entry in partial.rglob("*"):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], shard_size: str
) -> None:
    """Write weights in shards, and config.json after them.

    Args:
        directory: exists.
        config: content of config.json; special tokens go into generation_config.json too.
        tensors: by name.
        shard_size: of a file at most, as "5GB".
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        # Copies, one file's at a time: tensors that are parts of one cannot be written.
        part = {name: tensors[name].cpu().clone() for name in names}
        save_file(part, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(directory / INDEX, index)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / GENERATION, tokens)
    _write_json(directory / CONFIG, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json, checked by name and type in what an import reads of it.

    Raises:
        ValueError: there is none, it is no JSON object, or a value is of another type; names it.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} holds no Hugging Face model: {CONFIG} is missing")
    config = _read_json(path)
    for name, value in config.items():
        if value is None and name in _OPTIONAL:
            continue
        least = _LEAST.get(name, 0)
        if name in _COUNTS and not (type(value) is int and value >= least):
            wanted = f"a whole number from {least} on"
            raise ValueError(f"{path}: {name} must be {wanted}, got {value!r}")
        if name in _NUMBERS and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{path}: {name} must be a number, got {value!r}")
        if name in _SWITCHES and type(value) is not bool:
            raise ValueError(f"{path}: {name} must be true or false, got {value!r}")
        if name in _OBJECTS and not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be an object, got {value!r}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all weights of a model in safetensors.

    Raises:
        ValueError: there are none, the index is wrong, or a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = directory / INDEX
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index}: weight_map must be an object, got {files!r}")
        for weight, name in files.items():
            # Nothing outside of the directory is read.
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index}: weight_map: {weight} must name a file, got {name!r}")
        names = sorted(set(files.values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{directory} holds no *.safetensors")
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found.update(load_file(directory / name))
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is no file of safetensors: {error}") from None
    return found


def is_exported(directory: str | Path | None) -> bool:
    """Return whether a path is a Hugging Face directory, and no checkpoint of Megatron's."""
    return directory is not None and (Path(directory) / CONFIG).is_file()
