"""A CUDA graph's stand-in on the CPU: records what a call launches, and replays it.

A graph repeats kernels on the addresses that they had, and runs no Python. So does this: operators
are called again on the tensors that they had, and what they return is copied to where it was.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from tests.kernels.our_kernels import intercept

# These would wait for the device, which a capture does not allow.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim")


class Recording(TorchDispatchMode):
    """Records operators and our kernels while it is on.

    A tensor that is made while recording may not be read by Python, which would have to wait for
    it: that raises.
    """

    def __init__(self):
        super().__init__()
        self._steps: list = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function.overloadpacket.__name__
        assert not name.startswith(_WAITS), f"{name} waits for the device"
        # Tensors with their shapes as they are now, which may be changed in place.
        kept, kept_options = tree_map(
            lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (arguments, options)
        )
        result = function(*arguments, **options)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        inputs = [t for t in tree_flatten((arguments, options))[0] if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in inputs}
        # Views and results in place are where they were.
        made = [t.untyped_storage().data_ptr() not in places for t in outputs]
        outputs = [t.detach() for t in outputs]
        self._steps.append((function, kept, kept_options, outputs, made))
        return result

    @contextlib.contextmanager
    def capture(self, monkeypatch):
        """Record what happens in this context, kernels included."""
        steps = self._steps

        def launch(kernel, grid, arguments, options):
            def run():
                with _disable_current_modes():
                    kernel[grid](*arguments, **options)

            run()
            steps.append(run)

        with monkeypatch.context() as patched:
            intercept(patched, lambda name, *call: launch(*call))
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with self:
                yield

    def replay(self):
        """Run the recorded operators and kernels again, on the same tensors."""
        with torch.no_grad():
            for step in self._steps:
                if callable(step):
                    step()
                    continue
                function, arguments, options, outputs, made = step
                again = function(*arguments, **options)
                found = [t for t in tree_flatten(again)[0] if isinstance(t, torch.Tensor)]
                for place, value, is_new in zip(outputs, found, made, strict=True):
                    if is_new:
                        place.copy_(value)
