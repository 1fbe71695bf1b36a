"""Which models a format holds, and that its weights come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_maxscore.export import FORMATS, choose, weights
from megatron_maxscore.export.directory import appearing, check_free, read_config, read_weights
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128 "
    "--num-experts 16 --moe-router-topk 4 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --moe-router-type maxscore"
)
SERVABLE = f"{MODEL} --maxscore-preset servable"
SIGMOID = f"{MODEL} --moe-router-score-function sigmoid"
# Flags, the format that holds the model or none, and what is said.
CASES = {
    "softmax": (SERVABLE, "ernie4_5_moe", ""),
    "softmax, by hand": (
        f"{MODEL} --maxscore-gate score --maxscore-objective scores", "ernie4_5_moe", "",
    ),
    "sigmoid": (f"{SIGMOID} --maxscore-preset servable", "glm4_moe", ""),
    "sigmoid with bias": (f"{SIGMOID} --moe-router-enable-expert-bias", "glm4_moe", ""),
    "shared experts": (
        f"{SERVABLE} --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 64",
        "ernie4_5_moe", "",
    ),
    "one shared expert of no size that fits": (
        f"{SERVABLE} --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 48",
        None, "make --moe-shared-expert-intermediate-size 48 a multiple",
    ),
    "groups": (
        f"{SIGMOID} --moe-router-enable-expert-bias --moe-router-num-groups 4 "
        "--moe-router-group-topk 2", "glm4_moe", "",
    ),
    "groups of another rank": (
        f"{SIGMOID} --moe-router-enable-expert-bias --moe-router-num-groups 4 "
        "--moe-router-group-topk 1", None, "half of --moe-router-topk 4",
    ),
    "groups and softmax": (
        f"{SERVABLE} --moe-router-num-groups 4 --moe-router-group-topk 2",
        None, "use --moe-router-score-function sigmoid (it is softmax)",
    ),
    "defaults": (MODEL, None, "add --maxscore-preset servable (gates are SoftTopk, prices"),
    "prices of logits": (SIGMOID, None, "add --maxscore-preset servable (prices are of logits)"),
    "prices of softmax's logits": (
        f"{MODEL} --maxscore-gate score", None, "prices are of logits",
    ),
    "pre-softmax": (
        f"{SERVABLE} --moe-router-pre-softmax", None, "leave out --moe-router-pre-softmax",
    ),
    "scaled softmax": (
        f"{SERVABLE} --moe-router-topk-scaling-factor 2.5", None,
        "leave out --moe-router-topk-scaling-factor 2.5",
    ),
    "layer norm": (
        f"{SERVABLE} --normalization LayerNorm", None,
        "use --normalization RMSNorm (it is LayerNorm)",
    ),
    "biases": (
        SERVABLE.replace("--disable-bias-linear", ""), None, "add --disable-bias-linear",
    ),
    "learned positions": (
        SERVABLE.replace("rope", "learned_absolute"), None, "use --position-embedding-type rope",
    ),
    "latent attention": (
        f"{SIGMOID} --maxscore-preset servable --multi-latent-attention", None,
        "leave out --multi-latent-attention",
    ),
    "dense layers first": (f"{SERVABLE} --moe-layer-freq ([0]*2+[1]*2)", "ernie4_5_moe", ""),
    "dense layers between": (f"{SERVABLE} --moe-layer-freq ([0,1]*2)", "ernie4_5_moe", ""),
    "every second layer, from the first on": (
        f"{SERVABLE} --moe-layer-freq 2", None, "counted from 1, must be a multiple of n",
    ),
    "experts without a pattern": (
        f"{SERVABLE} --moe-layer-freq [1,1,0,1]", None, "one distance in --moe-layer-freq",
    ),
    "norm without weights": (f"{SERVABLE} --qk-l2-norm", None, "leave out --qk-l2-norm"),
    "no experts": (
        SERVABLE.replace("--num-experts 16", ""), None, "add --num-experts",
    ),
    "no layer with experts": (
        f"{SERVABLE} --moe-layer-freq [0,0,0,0]", None, "layers with experts",
    ),
    "stock, softmax": (MODEL.replace("maxscore", "topk"), "ernie4_5_moe", ""),
    "stock, sinkhorn": (
        MODEL.replace("maxscore", "topk") + " --moe-router-load-balancing-type sinkhorn", None,
        "use --moe-router-load-balancing-type none",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """Return the reasons of all cases, from one process, since Megatron is changed by it."""
    flags = {name: case[0] for name, case in CASES.items()}
    done = forked.python("-m", "tests.export_probe", json.dumps(flags))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND ")[1])


@pytest.mark.parametrize("name", CASES)
def test_which_format_holds_a_model(found, name):
    _, wanted, said = CASES[name]
    fitting = [kind for kind, reasons in found[name].items() if not reasons]
    assert fitting == ([wanted] if wanted else [])
    if said:
        reasons = [reason for reasons in found[name].values() for reason in reasons]
        assert any(said in reason for reason in reasons), found[name]


def arguments(**changed):
    """Return Megatron's arguments of a small model."""
    values = dict(
        num_layers=3, hidden_size=24, num_attention_heads=4, kv_channels=8, num_query_groups=2,
        group_query_attention=True, ffn_hidden_size=20, moe_ffn_hidden_size=12, num_experts=6,
        moe_layer_freq=[0, 1, 1], rotary_percent=1.0, rotary_interleaved=False,
        moe_shared_expert_intermediate_size=None, params_dtype=torch.float32,
        max_position_embeddings=64, init_method_std=0.02, layernorm_epsilon=1e-5,
        rotary_base=10000, untie_embeddings_and_output_weights=True, add_qkv_bias=False,
        qk_layernorm=False, moe_router_topk=2, moe_router_topk_scaling_factor=None,
    )  # fmt: skip
    return SimpleNamespace(**values | changed)


def state_of(args, vocabulary, has_bias):
    """Return random weights under Megatron's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    width = args.num_query_groups * (args.num_attention_heads // args.num_query_groups + 2)
    state = {
        "embedding.word_embeddings.weight": random(vocabulary, args.hidden_size),
        "output_layer.weight": random(vocabulary, args.hidden_size),
        "decoder.final_layernorm.weight": random(args.hidden_size),
    }
    for layer, is_routed in enumerate(args.moe_layer_freq):
        prefix = f"decoder.layers.{layer}."
        state |= {
            f"{prefix}input_layernorm.weight": random(args.hidden_size),
            f"{prefix}pre_mlp_layernorm.weight": random(args.hidden_size),
            f"{prefix}self_attention.linear_qkv.weight": random(
                width * args.kv_channels, args.hidden_size
            ),
            f"{prefix}self_attention.linear_proj.weight": random(
                args.hidden_size, args.num_attention_heads * args.kv_channels
            ),
        }
        if has_bias:
            state[f"{prefix}self_attention.linear_qkv.bias"] = random(width * args.kv_channels)
        networks = {"mlp": args.ffn_hidden_size}
        if is_routed:
            state[f"{prefix}mlp.router.weight"] = random(args.num_experts, args.hidden_size)
            state[f"{prefix}mlp.router.bias"] = random(args.num_experts)
            networks = {
                f"mlp.experts.local_experts.{expert}": args.moe_ffn_hidden_size
                for expert in range(args.num_experts)
            }
        for name, size in networks.items():
            state[f"{prefix}{name}.linear_fc1.weight"] = random(2 * size, args.hidden_size)
            state[f"{prefix}{name}.linear_fc2.weight"] = random(args.hidden_size, size)
    return state


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_come_back_as_they_were(kind):
    args, format_ = arguments(), FORMATS[kind]
    state = state_of(args, 40, has_bias=kind == "glm4_moe")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name][32:] = 0.0  # rows that pad the vocabulary of 32
    tensors = weights.exported(state, format_, args, 32)
    assert all(not name.startswith("decoder") for name in tensors)
    assert tensors["model.embed_tokens.weight"].shape == (32, 24)
    shape = {"num_hidden_layers": 3, "n_shared_experts": 1, "tie_word_embeddings": False}
    # Layers that predict further tokens, and an output layer that the embedding is.
    others = {"model.layers.3.eh_proj.weight": torch.ones(2), "model.mtp_x": torch.ones(2)}
    tied, config = weights.simplest(tensors | others, shape | {"tie_word_embeddings": True})
    assert config["tie_word_embeddings"] and not {*others, "lm_head.weight"} & tied.keys()
    kept, config = weights.simplest(tensors, shape)
    assert config["n_shared_experts"] == (0 if kind == "glm4_moe" else 1)
    assert not config["tie_word_embeddings"] and "lm_head.weight" in kept
    back = weights.imported(kept, state, format_, args, 32)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    tensors["model.layers.1.mlp.odd.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="no place for"):
        weights.imported(tensors, state, format_, args, 32)
    del kept["model.norm.weight"]
    with pytest.raises(ValueError, match=r"no weight model\.norm\.weight"):
        weights.imported(kept, state, format_, args, 32)
    state["decoder.layers.0.self_attention.sink"] = torch.zeros(2)
    with pytest.raises(ValueError, match="no place for the weight"):
        weights.exported(state, format_, args, 32)


def rotated(x, angles, neighbours):
    """Rotate channels by their angles, as halves or as neighbours."""
    if neighbours:
        first, second = x[..., 0::2], x[..., 1::2]
        parts = (first * angles.cos() - second * angles.sin(),
                 second * angles.cos() + first * angles.sin())  # fmt: skip
        return torch.stack(parts, -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        -1,
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_rotary_channels_keep_attention_scores(kind):
    args, format_ = arguments(num_query_groups=4), FORMATS[kind]
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(4 * 3 * 8, 24, generator=generator)
    inputs = torch.randn(2, 24, generator=generator)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    state = state_of(args, 32, has_bias=False) | {name: qkv}
    tensors = weights.exported(state, format_, args, 32)
    angles = torch.tensor([[0.3, 0.1, 0.03, 0.01]]) * torch.tensor([[5.0], [2.0]])

    def score(queries, keys, neighbours):
        query, key = (
            rotated((inputs @ part.T).view(2, 4, 8), angles[:, None], neighbours)
            for part in (queries, keys)
        )
        return (query[0] * key[1]).sum(-1)

    ours = qkv.view(4, 3, 8, 24)
    before = score(ours[:, 0].reshape(32, 24), ours[:, 1].reshape(32, 24), False)
    names = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    after = score(*(tensors[name] for name in names), format_.is_rotary_interleaved)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "served"
    with pytest.raises(RuntimeError), appearing(output) as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with appearing(output) as partial:
        (partial / "file").write_text("whole")
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    with pytest.raises(ValueError, match=r"exists; name a new directory"):
        check_free(output)
    with pytest.raises(ValueError, match="is no directory"):
        check_free(tmp_path / "nowhere" / "served")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json is not JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        (
            '{"num_hidden_layers": "four"}',
            "num_hidden_layers must be a whole number from 0 on, got 'four'",
        ),
        ('{"hidden_size": -64}', "hidden_size must be a whole number from 0 on, got -64"),
        ('{"moe_k": true}', "moe_k must be a whole number from 0 on, got True"),
        ('{"moe_layer_interval": 0}', "moe_layer_interval must be a whole number from 1 on, got 0"),
        ('{"rms_norm_eps": "small"}', "rms_norm_eps must be a number, got 'small'"),
        ('{"rope_theta": NaN}', "rope_theta must be a number, got nan"),
        ('{"tie_word_embeddings": "no"}', "tie_word_embeddings must be true or false, got 'no'"),
        ('{"rope_parameters": [1]}', r"rope_parameters must be an object, got \[1\]"),
    ],
)
def test_a_wrong_config_is_told_by_name(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_config(tmp_path)


def test_a_config_may_leave_things_open(tmp_path):
    text = '{"head_dim": null, "rope_scaling": null, "moe_layer_end_index": -1, "other": [1]}'
    (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path)["moe_layer_end_index"] == -1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"lm_head.weight": "../other/model.safetensors"}}', "must name a file"),
        ('{"weight_map": {"lm_head.weight": 3}}', "lm_head.weight must name a file, got 3"),
        ('{"weight_map": ["a"]}', "weight_map must be an object"),
        ("{}", "weight_map must be an object, got None"),
    ],
)
def test_a_wrong_index_is_told_by_name(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path)


def test_weights_that_are_no_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor" * 10)
    with pytest.raises(ValueError, match=r"model\.safetensors is no file of safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tied_output_layer_is_written_where_servers_ask_for_it(kind):
    args, format_ = arguments(untie_embeddings_and_output_weights=False), FORMATS[kind]
    state = state_of(args, 32, has_bias=False)
    del state["output_layer.weight"]
    tensors, config = weights.exported(state, format_, args, 32), format_.config(args)
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in tensors)
    if kind == "glm4_moe":
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    kept, config = weights.simplest(tensors, {"num_hidden_layers": 3, **config})
    assert config["tie_word_embeddings"] and "lm_head.weight" not in kept


def test_what_any_format_asks_for_is_said_once():
    with pytest.raises(ValueError, match=r"exactly; use --normalization .*; for glm4_moe "):
        choose(SimpleNamespace(
            normalization="LayerNorm", swiglu=True, add_bias_linear=False, num_layers=1,
            position_embedding_type="rope", moe_router_score_function="softmax",
            moe_layer_freq=1, moe_router_topk=2, moe_router_type="topk", num_experts=4,
        ))  # fmt: skip
