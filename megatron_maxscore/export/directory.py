"""A directory that appears when it is complete."""

from __future__ import annotations

import contextlib
import json
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
    """Give a directory beside ``path``, which takes its name when the block ends without an error.

    Otherwise it is removed. What a killed process leaves is hidden, and called incomplete.
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
    """Return config.json.

    Raises:
        ValueError: there is none.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} holds no Hugging Face model: {CONFIG} is missing")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all weights of a model in safetensors.

    Raises:
        ValueError: there are none.
    """
    from safetensors.torch import load_file

    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{directory} holds no *.safetensors")
    return {name: tensor for file in names for name, tensor in load_file(directory / file).items()}


def is_exported(directory: str | Path | None) -> bool:
    """Return whether a path is a Hugging Face directory, and no checkpoint of Megatron's."""
    return directory is not None and (Path(directory) / CONFIG).is_file()
