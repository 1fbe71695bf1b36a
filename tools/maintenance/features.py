"""What must work together with MaxScore routing, item by item, and what is refused.

One list serves the tests that train with each item and the table in docs/evidence/compatibility.md.
"""

from __future__ import annotations

from dataclasses import dataclass

PIPELINE = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
TP2_EP2 = (
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size"
)
FLEX = "--moe-router-dtype fp32 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend"
VPP = f"{PIPELINE} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"


@dataclass(frozen=True)
class Item:
    """A configuration that trains.

    Attributes:
        name: as in the table.
        flags: Megatron's and ours, besides those of every test run.
        ranks: processes.
        moe_layers: indices of the layers that have a router, from 0, among all layers.
        quick: whether it is in the quick suite, on the newest release.
        scopes: scopes to train in.
        since: first release that has it.
    """

    name: str
    flags: str
    ranks: int = 2
    moe_layers: tuple[int, ...] = (0, 1)
    quick: bool = False
    scopes: tuple[str, ...] = ("local",)
    since: str = "0.17"


@dataclass(frozen=True)
class Refusal:
    """A configuration that is refused when arguments are validated.

    Attributes:
        name: as in the table.
        flags: what the user gives.
        words: what the one line must name: both flags and the nearest choice.
        since: first release that has the flag.
    """

    name: str
    flags: str
    words: tuple[str, ...] = ()
    since: str = "0.17"


PARALLELISM = (
    Item("TP + SP, ETP < TP", f"{TP2_EP2} 1", 4, scopes=("local", "group", "sequence")),
    Item("ETP = TP, with EP", f"{TP2_EP2} 2", 4, scopes=("local", "group")),
    Item("PP", PIPELINE, 4, scopes=("local", "group")),
    Item("VPP (interleaved)", VPP, 4, (0, 1, 2, 3), scopes=("local", "group")),
    Item("EP", "--expert-model-parallel-size 4", 4, scopes=("local", "group")),
    Item("DP", ""),
    Item("distributed optimizer", f"{EP2} --use-distributed-optimizer", 4),
    Item(
        "TP x PP x EP", f"{TP2_EP2} 1 --pipeline-model-parallel-size 2", 8,
        scopes=("local", "group"),
    ),
    Item(
        "TP x EP x DP, distributed optimizer", f"{TP2_EP2} 1 --use-distributed-optimizer", 8,
        scopes=("group",),
    ),
    Item(
        "PP x VPP x EP, distributed optimizer", f"{VPP} --use-distributed-optimizer", 4,
        (0, 1, 2, 3), quick=True,
    ),
    Item(
        "dense layers between (--moe-layer-freq)",
        f"{PIPELINE} --num-layers 4 --moe-layer-freq ([0,1]*2)", 4, (1, 3),
    ),
    Item(
        "pipeline stage without MoE layer",
        f"{PIPELINE} --num-layers 4 --moe-layer-freq ([0]*2+[1]*2)", 4, (2, 3),
        scopes=("group",),
    ),
    Item(
        "uneven pipeline", f"{PIPELINE} --num-layers 3 --decoder-first-pipeline-num-layers 1", 4,
        (0, 1, 2),
    ),
)  # fmt: skip

FEATURES = (
    Item("shared experts", f"{EP2} --moe-shared-expert-intermediate-size 32"),
    Item(
        "shared experts, overlap",
        f"{EP2} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap",
        scopes=("local", "group"),
    ),
    Item(
        "group-limited routing",
        f"{EP2} --moe-router-num-groups 4 --moe-router-group-topk 2", scopes=("local", "group"),
    ),
    Item("z-loss", f"{EP2} --moe-z-loss-coeff 1e-3"),
    Item(
        "auxiliary loss",
        f"{EP2} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
    ),
    Item(
        "auxiliary loss per sequence",
        f"{EP2} --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2",
    ),
    Item(
        "auxiliary loss over the global batch",
        f"{EP2} --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-2",
    ),
    Item("input jitter", f"{EP2} --moe-input-jitter-eps 1e-2"),
    Item("router dtype fp32", f"{EP2} --bf16 --moe-router-dtype fp32"),
    Item("router dtype fp64", f"{EP2} --moe-router-dtype fp64"),
    Item("bf16 router", f"{EP2} --bf16"),
    Item("top-k scaling factor", f"{EP2} --moe-router-topk-scaling-factor 2.5"),
    Item("score function sigmoid", f"{EP2} --moe-router-score-function sigmoid"),
    Item(
        "score function sqrtsoftplus", f"{EP2} --moe-router-score-function sqrtsoftplus",
        since="0.18",
    ),
    Item(
        "expert bias, which holds the prices",
        f"{EP2} --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
        scopes=("local", "group"),
    ),
    Item("pre-softmax", f"{EP2} --moe-router-pre-softmax --maxscore-gate score"),
    Item(
        "selective recompute of moe",
        f"{EP2} --recompute-granularity selective --recompute-modules moe",
        scopes=("local", "group"),
    ),
    Item(
        "full recompute",
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Item(
        "MTP layers", f"{EP2} --mtp-num-layers 1", moe_layers=(0, 1, 2), scopes=("local", "group")
    ),
    Item("router replay", f"{EP2} --moe-enable-routing-replay"),
    Item(
        "allgather dispatcher", f"{EP2} --moe-token-dispatcher-type allgather",
        scopes=("local", "group"),
    ),
    Item("flex dispatcher, DeepEP (stand-in)", f"{EP2} {FLEX} deepep", scopes=("local", "group")),
    Item("flex dispatcher, HybridEP (stand-in)", f"{EP2} {FLEX} hybridep", scopes=("local",)),
    Item("router fusion (our kernels in its place)", f"{EP2} --moe-router-fusion"),
    Item("forced load balancing", f"{EP2} --moe-router-force-load-balancing"),
    Item("per-layer logging", f"{EP2} --moe-per-layer-logging"),
    Item(
        "1F1B overlap of expert communication",
        f"{VPP} --overlap-moe-expert-parallel-comm --bf16 --moe-router-dtype fp32", 4, (0, 1, 2, 3),
    ),
    Item(
        "features together",
        f"{EP2} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap "
        "--moe-z-loss-coeff 1e-3 --moe-router-load-balancing-type seq_aux_loss "
        "--moe-aux-loss-coeff 1e-2 --moe-input-jitter-eps 1e-2 --moe-router-dtype fp64 "
        "--moe-router-topk-scaling-factor 2.5 --mtp-num-layers 1 --moe-enable-routing-replay "
        "--recompute-granularity selective --recompute-modules moe --moe-per-layer-logging",
        moe_layers=(0, 1, 2), quick=True, scopes=("group",),
    ),
)  # fmt: skip

_MAXSCORE = "--moe-router-type maxscore"
REFUSALS = (
    Refusal(
        "more groups than experts of a token",
        "--moe-router-num-groups 4 --moe-router-group-topk 4",
        ("--moe-router-group-topk 4", "at most --moe-router-topk 2"),
    ),
    Refusal(
        "groups with fewer experts than a token takes",
        "--moe-router-topk 6 --moe-router-num-groups 4 --moe-router-group-topk 2",
        ("hold 4 experts", "--moe-router-topk 6"),
    ),
    Refusal(
        "full-iteration CUDA graph of a dispatcher that copies counts",
        "--cuda-graph-impl full_iteration --maxscore-mode auto "
        "--no-check-for-nan-in-loss-and-grad --moe-token-dispatcher-type allgather",
        ("the full iteration", "--moe-token-dispatcher-type alltoall"), since="0.19",
    ),
    Refusal(
        "full-iteration CUDA graph of HybridEP without a budget",
        f"--cuda-graph-impl full_iteration --maxscore-mode auto {FLEX} hybridep "
        "--no-check-for-nan-in-loss-and-grad",
        ("--moe-expert-rank-capacity-factor",), since="0.19",
    ),
    Refusal(
        "groups of unequal size", "--moe-router-num-groups 3 --moe-router-group-topk 1",
        ("--moe-router-num-groups", "--num-experts 8"),
    ),
    Refusal(
        "expert bias of a softmax", "--moe-router-enable-expert-bias",
        ("--moe-router-enable-expert-bias", "--moe-router-score-function sigmoid"),
    ),
    Refusal(
        "logits as objective with an expert bias",
        "--moe-router-enable-expert-bias --moe-router-score-function sigmoid "
        "--maxscore-objective logits",
        ("--moe-router-enable-expert-bias", "leave --maxscore-objective out"),
    ),
    Refusal(
        "NCCL EP in CPU mode",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
        ("--moe-flex-dispatcher-backend ncclep", "use hybridep"), since="0.19",
    ),
    Refusal(
        "a budget of rows that is too small",
        f"{FLEX} hybridep --use-transformer-engine-op-fuser "
        "--moe-expert-rank-capacity-factor 0.9",
        ("--moe-expert-rank-capacity-factor 0.9", "make it at least"), since="0.18",
    ),
    Refusal(
        "Megatron-FSDP", "--use-megatron-fsdp",
        ("--use-megatron-fsdp", "--use-distributed-optimizer"),
    ),
    Refusal(
        "Torch FSDP2", "--use-torch-fsdp2", ("--use-torch-fsdp2", "--use-distributed-optimizer"),
    ),
    Refusal(
        "context parallelism without Transformer Engine", "--context-parallel-size 2",
        ("--context-parallel-size 2", "--transformer-impl transformer_engine"),
    ),
    Refusal(
        "packed sequences in scope sequence", "--sft --maxscore-scope sequence",
        ("--sft", "--maxscore-scope sequence", "--maxscore-scope group"),
    ),
    Refusal(
        "Sinkhorn", "--moe-router-load-balancing-type sinkhorn",
        ("--moe-router-load-balancing-type sinkhorn", "use none or an auxiliary loss"),
    ),
    Refusal(
        "quantile balancing", "--moe-router-load-balancing-type quantile_balancing",
        ("--moe-router-load-balancing-type quantile_balancing", "use none"), since="0.19",
    ),
    Refusal(
        "capacity factor that drops", "--moe-expert-capacity-factor 1.0",
        ("--moe-expert-capacity-factor", "--maxscore-capacity-factor"),
    ),
    Refusal(
        "CUDA graphs of whole layers", "--cuda-graph-impl local",
        ("CUDA graphs of whole layers", "--cuda-graph-modules attn moe_router moe_preprocess"),
    ),
    Refusal(
        "CUDA graph of the router in scope group",
        "--cuda-graph-impl transformer_engine {graph_flag} moe_router --maxscore-scope group "
        "--maxscore-mode auto",
        ("CUDA graphs of the router", "--maxscore-scope group", "use --maxscore-scope local"),
    ),
    Refusal(
        "CUDA graph of a router that is solved on the host",
        "--cuda-graph-impl transformer_engine {graph_flag} moe_router",
        ("CUDA graphs of the router", "--maxscore-mode exact"),
    ),
    Refusal(
        "CUDA graph of a dispatch whose splits vary",
        "--cuda-graph-impl transformer_engine {graph_flag} moe_router moe_preprocess "
        "--maxscore-mode auto --seq-length 63 --max-position-embeddings 63",
        ("CUDA graphs of the dispatch", "252 assignments", "hybridep"),
    ),
    Refusal(
        "top-1 with normalised gates", "--moe-router-topk 1 --maxscore-normalize-gates",
        ("--maxscore-normalize-gates", "--moe-router-topk 1"),
    ),
    Refusal(
        "top-1 with a softmax over the chosen", "--moe-router-topk 1 --maxscore-gate score",
        ("--maxscore-gate score", "--moe-router-topk 1", "--moe-router-pre-softmax"),
    ),
    Refusal(
        "all experts with bi-entropic gates", "--moe-router-topk 8",
        ("--moe-router-topk 8", "--num-experts 8", "--maxscore-gate score"),
    ),
    Refusal("top-0", "--moe-router-topk 0", ("--moe-router-topk 0", "between 1 and")),
    Refusal(
        "more experts than the solver takes", "--num-experts 8192",
        ("--num-experts is 8192", "4096", "--moe-router-type topk"),
    ),
    Refusal(
        "statistics where they cannot be written", "--maxscore-stats-file /nowhere/stats.jsonl",
        ("--maxscore-stats-file /nowhere/stats.jsonl", "no directory"),
    ),
    Refusal(
        "statistics into a directory", "--maxscore-stats-file /tmp",
        ("--maxscore-stats-file /tmp", "is a directory"),
    ),
    Refusal(
        "recorded scores below a file", "--maxscore-record-dir /etc/hostname/scores",
        ("--maxscore-record-dir /etc/hostname/scores", "no directory"),
    ),
    Refusal(
        "a fixed shape of one number", "--maxscore-fixed-shape 64 -2",
        ("--maxscore-fixed-shape", "-2"),
    ),
    Refusal(
        "top-k above the number of experts", "--moe-router-topk 9",
        ("--moe-router-topk 9", "--num-experts 8"),
    ),
)  # fmt: skip

# What our checks let through though Megatron may need a GPU for it.
LET_THROUGH = (
    Refusal("CUDA graph of attention", "--cuda-graph-impl local {graph_flag} attn"),
    Refusal(
        "CUDA graph, by the flag's older name", "--cuda-graph-impl local --cuda-graph-scope attn"
    ),
    Refusal("permute fusion", "--moe-permute-fusion"),
    Refusal(
        "CUDA graph of router and dispatch",
        "--cuda-graph-impl transformer_engine {graph_flag} attn moe_router moe_preprocess "
        "--maxscore-mode auto",
    ),
    Refusal(
        "fp8 padding of experts' rows, in any scope",
        "--fp8-format hybrid --moe-router-padding-for-quantization --maxscore-scope group",
    ),
    Refusal("Transformer Engine with context parallelism", "--context-parallel-size 2 {te}"),
)


def known_to(release: str, items: tuple) -> list:
    """Return the items that a release has."""
    own = tuple(map(int, release.split(".")[:2]))
    return [item for item in items if tuple(map(int, item.since.split("."))) <= own]
