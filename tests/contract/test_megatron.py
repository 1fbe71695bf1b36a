"""Symbols and signatures of the installed megatron-core that we build on.

A release that changes one of them fails here by name, before anything fails in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect

import pytest

SYMBOLS = [
    "megatron.core.jit:noop_decorator",
    "megatron.core.jit:jit_fuser",
    "megatron.core.datasets.utils:compile_helpers",
    "megatron.core.datasets.indexed_dataset:IndexedDatasetBuilder.add_item",
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    "megatron.core.tensor_parallel.random:CheckpointFunction.apply",
    "megatron.core.transformer.moe.moe_utils:get_default_pg_collection",
    "megatron.core.transformer.torch_norm:WrappedTorchNorm",
    "megatron.core.transformer.moe.moe_layer:MoEAlltoAllTokenDispatcher",
    "megatron.core.transformer.moe.moe_layer:MoELayer.__init__",
    "megatron.core.transformer.moe.router:TopKRouter.apply_z_loss",
    "megatron.core.transformer.moe.router:TopKRouter._maintain_float32_expert_bias",
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.dispatch_postprocess",
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.set_shared_experts",
    "megatron.training.arguments:add_megatron_arguments",
    "megatron.training.arguments:validate_args",
    "megatron.training.checkpointing:load_args_from_checkpoint",
    "megatron.training.training:finalize_model_grads",
    "megatron.training.training:train_step",
    "megatron.training.training:evaluate_and_print_results",
]

# Parameters that we pass or receive, in order; others may follow.
PARAMETERS = {
    "megatron.core.tensor_parallel.random:CheckpointFunction.forward": [
        "ctx",
        "run_function",
        "distribute_saved_activations",
    ],
    "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.checkpoint": [
        "self",
        "run_function",
    ],
    "megatron.core.pipeline_parallel.schedules:set_current_microbatch": ["model", "microbatch_id"],
    "megatron.core.transformer.moe.token_dispatcher:permute": ["tokens", "routing_map"],
    "megatron.training.training:train_step": ["forward_step_func", "data_iterator", "model"],
    "megatron.core.transformer.moe.moe_layer:MoELayer.__init__": ["self", "config", "submodules"],
    "megatron.core.transformer.moe.router:TopKRouter.__init__": [
        "self",
        "config",
        "pg_collection",
        "is_mtp_layer",
    ],
    "megatron.core.transformer.moe.router:TopKRouter.routing": ["self", "logits", "padding_mask"],
    "megatron.core.transformer.moe.router:TopKRouter.apply_z_loss": ["self", "logits"],
    "megatron.core.transformer.moe.router_replay:RouterReplay.get_replay_topk": [
        "self",
        "scores",
        "topk",
        "num_groups",
        "group_topk",
        "default_compute_topk",
    ],
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess": [
        "self",
        "routing_map",
    ],
    "megatron.training.training:evaluate_and_print_results": [
        "prefix",
        "forward_step_func",
        "data_iterator",
        "model",
    ],
}


def resolve(path: str):
    module, _, name = path.partition(":")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", SYMBOLS)
def test_symbol_exists(path):
    assert resolve(path) is not None


@pytest.mark.parametrize("path", PARAMETERS)
def test_signature(path):
    names = list(inspect.signature(resolve(path)).parameters)
    assert names[: len(PARAMETERS[path])] == PARAMETERS[path]


def test_evaluate_takes_write_to_tensorboard():
    function = resolve("megatron.training.training:evaluate_and_print_results")
    assert "write_to_tensorboard" in inspect.signature(function).parameters


def test_router_slot():
    submodules = resolve("megatron.core.transformer.moe.moe_layer:MoESubmodules")
    fields = {f.name: f for f in dataclasses.fields(submodules)}
    top_k = resolve("megatron.core.transformer.moe.router:TopKRouter")
    assert fields["router"].default is top_k


def test_checkpoints_keep_the_function_that_they_run_again():
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    function = random.CheckpointFunction
    assert "ctx.run_function = run_function" in inspect.getsource(function.forward)
    assert "ctx.run_function(*" in inspect.getsource(function.backward)
    assert "CheckpointFunction.apply(" in inspect.getsource(random.checkpoint)
    without = random.CheckpointWithoutOutput
    assert "self.run_function = run_function" in inspect.getsource(without.checkpoint)
    assert "self.run_function(*" in inspect.getsource(without._recompute)


def test_schedules_tell_the_number_of_the_microbatch():
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert "set_current_microbatch(model, " in inspect.getsource(schedules.forward_step)


def test_dispatcher_permutes_by_a_module_global_and_the_map_it_was_given():
    cls = resolve("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher")
    source = inspect.getsource(cls.dispatch_preprocess)
    assert "= permute(" in source and "self.routing_map = routing_map" in source
    assert "self.preprocess(self.routing_map)" in source
    assert "view(self.hidden_shape)" in inspect.getsource(cls.combine_postprocess)


def test_a_step_tells_whether_the_optimizer_skipped_it():
    source = inspect.getsource(resolve("megatron.training.training:train_step"))
    assert "return {}, True, should_checkpoint" in source
    flat = "".join(source.split())
    assert "return(loss_reduced,skipped_iter," in flat or "returnloss_reduced,skipped_iter," in flat


def test_layer_builds_its_dispatcher_after_its_router():
    source = inspect.getsource(resolve("megatron.core.transformer.moe.moe_layer:MoELayer.__init__"))
    assert "= MoEAlltoAllTokenDispatcher(" in source
    assert source.index("self.router = ") < source.index("= MoEAlltoAllTokenDispatcher(")
    assert "self.token_dispatcher.set_shared_experts(self.shared_experts)" in source


def test_router_asks_router_replay_and_reads_pre_softmax_from_its_config():
    source = inspect.getsource(resolve("megatron.core.transformer.moe.router:TopKRouter.routing"))
    assert "router_replay=self.router_replay" in source
    assert "use_pre_softmax=self.config.moe_router_pre_softmax" in source
    assert "logits = self.apply_z_loss(" in source


def test_dispatcher_attributes_set_by_preprocess():
    cls = resolve("megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher")
    source = inspect.getsource(cls.preprocess)
    for name in (
        "num_out_tokens",
        "input_splits",
        "output_splits",
        "output_splits_tp",
        "num_global_tokens_per_local_expert",
    ):
        assert f"self.{name} =" in source
    assert "cuda_sync_point" in inspect.getsource(cls.__init__)


def test_loop_reads_finalize_model_grads_as_a_global():
    source = inspect.getsource(resolve("megatron.training.training:train"))
    assert "config.finalize_model_grads_func = finalize_model_grads" in source


def test_data_loader_draws_its_seed_in_the_iterator():
    base = resolve("torch.utils.data.dataloader:_BaseDataLoaderIter")
    assert "_base_seed" in inspect.getsource(base.__init__)


def test_config_fields_are_not_upstreams():
    """Our option names must not collide with fields that Megatron adds."""
    from megatron_maxscore.moe.fields import config_fields

    config = resolve("megatron.core.transformer:TransformerConfig")
    assert not {f.name for f in dataclasses.fields(config)} & config_fields().keys()


def test_parser_tells_an_auxiliary_loss_that_is_given_from_the_default():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    resolve("megatron.training.arguments:add_megatron_arguments")(parser)
    for flag, default in (
        ("moe-aux-loss-coeff", 0.0),
        ("moe-router-load-balancing-type", "aux_loss"),
    ):
        (action,) = (each for each in parser._actions if f"--{flag}" in each.option_strings)
        assert (action.nargs, action.default) == ("+", default)


def test_make_is_not_run_for_what_the_wheel_has(monkeypatch):
    from megatron.core.datasets import utils

    from megatron_maxscore._replacements import Replacements
    from megatron_maxscore._wheel import answer_dataset_helpers

    def run(command, **_):
        raise AssertionError(command)

    monkeypatch.setattr("subprocess.run", run)
    replacements = Replacements("test")
    answer_dataset_helpers(replacements)
    try:
        utils.compile_helpers()
        again = Replacements("again")
        answer_dataset_helpers(again)
        assert not again
    finally:
        replacements.undo()
