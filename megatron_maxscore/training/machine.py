"""Whether this machine has what arguments name: packages, data, and places to write to."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from megatron_maxscore import cpu
from megatron_maxscore.moe.config import MaxScoreConfig

# What Megatron says of the packages of its flex dispatcher, and their names.
_BACKENDS = {
    "deepep": ("HAVE_DEEP_EP", "DeepEP (the package deep_ep)"),
    "hybridep": ("HAVE_HYBRIDEP", "HybridEP (the package deep_ep of DeepEP's branch hybrid-ep)"),
    "ncclep": ("HAVE_TE_EP", "Transformer Engine built with NVTE_BUILD_WITH_NCCL_EP=1"),
}


def check_machine(args: Any) -> None:
    """Refuse packages and files that are missing, before ranks meet.

    Raises:
        ValueError: names the flag and what mends it.
    """
    _check_dispatcher(args)
    _check_data_paths(args)
    _check_written_paths(MaxScoreConfig.from_transformer_config(args))
    _check_asynchronous_saving(args)


def _check_dispatcher(args: Any) -> None:
    """Refuse a flex dispatcher whose package is missing, before ranks meet."""
    if getattr(args, "moe_token_dispatcher_type", None) != "flex" or args.num_experts is None:
        return
    from megatron.core.transformer.moe import fused_a2a

    backend = "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend
    mark, package = _BACKENDS[backend]
    if getattr(fused_a2a, mark, False):
        return
    fix = f"needs {package}, which is not installed; install it, or use another backend or"
    if backend == "ncclep" and cpu.is_enabled():
        fix = "runs on GPUs, and this is CPU mode; use hybridep or"
    raise ValueError(
        f"--moe-flex-dispatcher-backend {backend} {fix} --moe-token-dispatcher-type alltoall"
    )


def _check_data_paths(args: Any) -> None:
    """Only some ranks open the data; a missing file would leave the others waiting."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for item in getattr(args, name, None) or []:
            if _is_number(item) or "://" in item:
                continue
            for suffix in (".idx", ".bin"):
                if not os.path.exists(item + suffix):
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(
                        f"{flag} {item}: {item + suffix} does not exist; give the path without "
                        "its ending, or make the data with python -m megatron_maxscore prepare"
                    )


def _check_written_paths(options: MaxScoreConfig) -> None:
    """Refuse files that could not be written, before the first step is computed."""
    # Only the first node writes statistics; torchrun numbers nodes.
    if options.stats_file is not None and os.environ.get("GROUP_RANK", "0") == "0":
        path = os.path.abspath(options.stats_file)
        above = os.path.dirname(path)
        reason = ""
        if os.path.isdir(path):
            reason = "it is a directory; name a file in it"
        elif not os.path.isdir(above):
            reason = f"{above} is no directory; make it, or name another file"
        elif not os.access(path if os.path.exists(path) else above, os.W_OK):
            reason = "no permission to write there; name another file"
        if reason:
            raise ValueError(f"--maxscore-stats-file {path} cannot be written: {reason}")
    if options.record_dir is not None:
        path = above = os.path.abspath(options.record_dir)
        # It is made if need be, with the directories above it.
        while not os.path.exists(above):
            above = os.path.dirname(above)
        reason = ""
        if not os.path.isdir(above):
            reason = f"{above} is no directory; name another one"
        elif not os.access(above, os.W_OK):
            reason = f"no permission to write in {above}; name another directory"
        if reason:
            raise ValueError(f"--maxscore-record-dir {path} cannot be written: {reason}")


def _check_asynchronous_saving(args: Any) -> None:
    """Refuse a way of writing checkpoints whose package is missing, before ranks meet."""
    # Without the persistent worker Megatron saves synchronously.
    asked = getattr(args, "async_save", False) and getattr(
        args, "use_persistent_ckpt_worker", False
    )
    strategy = getattr(args, "async_strategy", None)
    if asked and strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "--async-save with --async-strategy nvrx needs the package nvidia-resiliency-ext; "
            "install it, or add --async-strategy mcore"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
