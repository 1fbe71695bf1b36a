"""Megatron's Transformer Engine specs with Transformer Engine stubbed; prints JSON.

Run in a process of its own: the stub has to be there before Megatron is imported, and does nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import sys
import types
from typing import Any

import torch

VERSION = "2.8.0"


class Stub(types.ModuleType):
    """A module that has every class and submodule one asks for."""

    __path__ = ()
    __version__ = VERSION

    def __call__(self, *_: Any, **__: Any) -> None:
        """Any function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = type(name, (torch.nn.Module,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for whatever is below ``transformer_engine``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] == "transformer_engine":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def install() -> None:
    """Make Megatron believe that Transformer Engine is installed."""
    sys.meta_path.insert(0, Finder())
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        VERSION if name.replace("_", "-").startswith("transformer-engine") else version(name)
    )


def submodules_of(layer_spec: Any) -> Any:
    """Return the MoE submodules of a layer spec, however the release holds them."""
    mlp = layer_spec.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def main() -> None:
    """Compare the specs before and after."""
    install()
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_maxscore.moe import MaxScoreConfig, MaxScoreRouter, with_maxscore

    found = {}
    for grouped in (False, True):
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=8, moe_grouped_gemm=grouped
        )
        stock = submodules_of(spec)
        ours = submodules_of(with_maxscore(spec, MaxScoreConfig()))
        router = ours.router
        changed = [
            field.name
            for field in dataclasses.fields(stock)
            if getattr(stock, field.name) is not getattr(ours, field.name)
            and repr(getattr(stock, field.name)) != repr(getattr(ours, field.name))
        ]
        found[f"grouped {grouped}"] = {
            "has_te": gpt_layer_specs.HAVE_TE,
            "changed": changed,
            "is_ours": getattr(router, "func", router) is MaxScoreRouter,
            "uses_te": "TE" in repr(ours.experts),
            "experts": repr(ours.experts)[:120],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
