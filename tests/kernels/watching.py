"""What a call does on the device: launches, allocations, and whether the host would wait."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.kernels.our_kernels import intercept

# Operators that launch nothing, for they only look at a tensor in another way.
VIEWS = (
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh",
)  # fmt: skip


def caller():
    """Return whose code, of the innermost frame that is anybody's, runs."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("megatron_maxscore") and not name.startswith("megatron_maxscore.cpu"):
            return "ours"
        if name.startswith("megatron.core"):
            return "megatron"
        frame = frame.f_back
    return "ours"


class Watch(TorchDispatchMode):
    """Counts device operations and new tensors; raises where the host would wait.

    Attributes:
        operations: operators that launch something, and kernels, by name.
        by_whom: the same by whose code has called them, "ours" or "megatron".
        made: storages that were made, by whose code.
    """

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim")

    def __init__(self):
        super().__init__()
        self.by_whom = {"ours": Counter(), "megatron": Counter()}
        self.made: Counter[str] = Counter()
        self._storages: set[int] = set()
        self._kept: list = []

    @property
    def operations(self):
        return self.by_whom["ours"] + self.by_whom["megatron"]

    @property
    def allocations(self):
        return self.made.total()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.waits), f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype.itemsize > 1 for i in arguments[1]), "index by a mask"
        result = function(*arguments, **(options or {}))
        who = caller()
        if name not in VIEWS:
            self.by_whom[who][name] += 1
        given = {t.untyped_storage().data_ptr() for t in arguments if hasattr(t, "untyped_storage")}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if hasattr(made, "untyped_storage"):
                place = made.untyped_storage().data_ptr()
                if place not in given and place not in self._storages:
                    self._storages.add(place)
                    self.made[who] += 1
                    self._kept.append(made)  # or its place would be given to another one
        return result

    @contextlib.contextmanager
    def kernels(self, monkeypatch):
        """Count launches of our kernels, which run outside of dispatch modes."""

        def launch(name, kernel, grid, arguments, options):
            # Triton 3.10 changes its default, and with it bits.
            assert "enable_fp_fusion" in options
            self.by_whom["ours"][name] += 1
            with _disable_current_modes():
                kernel[grid](*arguments, **options)

        with monkeypatch.context() as patched:
            intercept(patched, launch)
            with self:
                yield self
