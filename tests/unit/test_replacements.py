"""Replacing attributes and putting them back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_maxscore._replacements import Replacements


def test_undo_restores_own_and_inherited_attributes():
    class Base:
        def method(self):
            return "base"

    class Child(Base):
        pass

    owner = SimpleNamespace(value=1)
    replacements = Replacements("test")
    replacements.set(owner, "value", 2)
    replacements.set(owner, "value", 3)
    replacements.wrap(Child, "method", lambda original: lambda self: original(self) + "+")
    assert owner.value == 3 and Child().method() == "base+" and Base().method() == "base"
    assert Child.method.__wrapped__ is Base.method
    assert replacements
    replacements.undo()
    assert owner.value == 1 and "method" not in vars(Child) and not replacements


def test_missing_symbol_is_named():
    with pytest.raises(ImportError, match=r"test: json\.no_such does not exist.*0\.17 to 0\.20"):
        import json

        Replacements("test").wrap(json, "no_such", lambda original: original)


CPU_MODE = """
import torch, torch.distributed as dist
from megatron_maxscore import cpu
# Importing these replaces a few attributes of torch for good, with or without CPU mode.
import megatron.core.tensor_parallel.random, megatron.core.transformer.torch_norm
import megatron.core.datasets.utils
def refuse(*_): raise AssertionError("compiled")
# As functions of Megatron that was imported before.
compiled = torch.compile(lambda x: x + 1, backend=refuse)
# The first call of any such function replaces Module.__init__.
torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
watched = {
    (owner.__name__, name): vars(owner).get(name)
    for owner in (torch, torch.cuda, dist, torch.Tensor, torch.nn.Module)
    for name in list(vars(owner))
}
assert not cpu.is_enabled()
cpu.enable(); cpu.enable()
assert cpu.is_enabled() and torch.cuda.is_available()
x = torch.zeros(3, device="cuda")
assert compiled(x).sum() == 3
assert x.device.type == "cpu" and x.cuda(0).to("cuda:1").device.type == "cpu"
assert torch.tensor([1.0], device=torch.cuda.current_device()).type() == "torch.cuda.FloatTensor"
assert torch.nn.Linear(2, 2).cuda().to(torch.device("cuda", 3)).weight.device.type == "cpu"
assert x.new_ones(2, device="cuda:0").device.type == "cpu"
torch.cuda.manual_seed(3); state = torch.cuda.get_rng_state(); a = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(a, torch.rand(4))
state = torch.get_rng_state()
iter(torch.utils.data.DataLoader([1, 2]))
assert torch.equal(state, torch.get_rng_state()), "an iterator leaves dropout's stream alone"
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
with torch.cuda.stream(torch.cuda.Stream()):
    start.record(); end.record()
assert start.elapsed_time(end) >= 0
import deep_ep, deep_ep.utils
assert deep_ep.Buffer and deep_ep.HybridEPBuffer and deep_ep.utils.EventOverlap
cpu.disable(); cpu.disable()
import sys
assert "deep_ep" not in sys.modules and "deep_ep.utils" not in sys.modules
assert not cpu.is_enabled() and not torch._dynamo.config.disable
for owner in (torch, torch.cuda, dist, torch.Tensor, torch.nn.Module):
    for name in list(vars(owner)):
        if (owner.__name__, name) in watched:
            assert vars(owner)[name] is watched[owner.__name__, name], (owner, name)
assert "cuda" not in vars(torch.nn.Module) or torch.nn.Module.cuda.__module__.startswith("torch")
print("restored")
"""


def test_cpu_mode_answers_and_is_reversible():
    result = subprocess.run(
        [sys.executable, "-c", CPU_MODE], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.endswith("restored\n"), result.stderr


def test_cpu_mode_changes_nothing_where_cuda_is_there(monkeypatch, capsys):
    from megatron_maxscore import cpu

    monkeypatch.setattr(cpu, "_cuda_is_available", lambda: True)
    assert cpu.enable_if_needed(forced=False) is False
    assert not cpu.is_enabled() and capsys.readouterr().err == ""
