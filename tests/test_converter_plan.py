"""Which type each tensor gets."""

from __future__ import annotations

import json

import pytest
from gguf import GGMLQuantizationType as T

from spikequant_gguf import InputError, UnsupportedError
from spikequant_gguf.converter.plan import make_plan, parse_type_rules

SPK4 = T(90)
Q = ("blk.9.attn_q.weight", (64, 64), T.F16)


def types(tensors, rules=(), architecture="llama", **options):
    planned = make_plan(architecture, [*tensors, Q], parse_type_rules(rules), **options)
    assert planned.tensors[-1].name == Q[0]
    return [tensor.target_type for tensor in planned.tensors[:-1]]


def type_of(name, shape, kind=T.F16, rules=(), output=True, **options):
    others = [("output.weight", (256, 32), T.F16)] if output else []
    return types([(name, shape, kind), *others], rules, **options)[0]


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_k.weight",
        "blk.11.attn_qkv.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_down.weight",
        "blk.0.ssm_in.weight",
        "blk.0.attn_kv_a_mqa.weight",
        "cls.weight",
        "enc.blk.0.attn_q.weight",
        "blk.0.time_mix_key.weight",
        "blk.0.nextn.eh_proj.weight",
    ],
)
def test_matrices_of_linear_layers_spike(name):
    assert type_of(name, (128, 7)) == SPK4


def test_experts_spike():
    assert type_of("blk.0.ffn_gate_exps.weight", (128, 16, 8)) == SPK4


@pytest.mark.parametrize(
    "name, shape",
    [
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.attn_q_norm.weight", (64, 4)),
        ("blk.0.attn_q.bias", (64,)),
        ("blk.0.attn_q.bias", (64, 64)),
        ("rope_freqs.weight", (64,)),
        ("blk.0.ffn_gate_inp.weight", (64, 8)),
        ("position_embd.weight", (64, 512)),
        ("token_types.weight", (64, 2)),
        ("blk.0.ssm_conv1d.weight", (64, 64)),
        ("blk.0.shortconv.conv.weight", (64, 64)),
        ("blk.0.time_mix_w1.weight", (64, 64)),
        ("blk.0.attn_rel_b.weight", (64, 64)),
        ("per_layer_model_proj.weight", (64, 64)),
        ("blk.0.altup_proj.weight", (64, 4)),
        ("blk.0.ssm_a", (64, 64)),
        ("blk.0.exp_probs_b.bias", (64,)),
        # never quantized here although llama-quantize would: they are in no matrix product
        ("conv1d.weight", (64, 64, 7)),
        ("convnext.3.dw.weight", (64, 64)),
        ("blk.0.attn_compressor_ape.weight", (64, 64)),
        ("blk.0.attn_conv_base.weight", (64, 64)),
        # dimensions of size 1 do not count
        ("blk.0.attn_q.weight", (64, 1)),
        ("blk.0.attn_q.weight", (64, 1, 1)),
    ],
)
@pytest.mark.parametrize("kind", [T.F32, T.F16])
def test_what_is_kept(name, shape, kind):
    assert type_of(name, shape, kind) == kind
    assert type_of(name, shape, kind, rules=[".*=q8_0", "blk.9=spk4"]) == kind


def test_integers_are_kept():
    assert type_of("blk.0.ffn_gate_tid2eid.weight", (64, 64), T.I32) == T.I32
    assert type_of("blk.0.attn_q.weight", (64, 64), T.I32, rules=[".*=q8_0", "blk.9=spk4"]) == T.I32


@pytest.mark.parametrize(
    "n_in, kind",
    [(64, SPK4), (96, T.Q4_0), (32, T.Q4_0), (80, T.F16), (33_792, SPK4), (33_856, T.Q4_0), (33_800, T.F16)],
)
def test_rows_that_do_not_fit(n_in, kind):
    planned = make_plan("llama", [("blk.0.attn_k.weight", (n_in, 2), T.F32), Q])
    tensor = planned.tensors[0]
    assert tensor.target_type == kind
    assert (tensor.reason == "linear layer") == (kind == SPK4)
    assert kind == SPK4 or str(n_in) in tensor.reason


@pytest.mark.parametrize("n_in, kind", [(256, T.Q6_K), (576, T.Q8_0), (96, T.Q8_0), (80, T.F16)])
def test_output_and_shared_embeddings_keep_more_bits(n_in, kind):
    assert type_of("token_embd.weight", (n_in, 32), output=False) == kind
    assert types([("token_embd.weight", (256, 32), T.F16), ("output.weight", (n_in, 32), T.F16)]) == [
        T.Q4_0,
        kind,
    ]


def test_embeddings_of_their_own_are_looked_up():
    assert type_of("token_embd.weight", (64, 32)) == T.Q4_0
    assert type_of("per_layer_token_embd.weight", (64, 32)) == T.Q4_0
    assert type_of("per_layer_token_embd.weight", (256, 32), output=False) == T.Q6_K
    assert type_of("blk.0.nextn.embed_tokens.weight", (64, 32)) == T.Q4_0


def test_architectures_with_rules_of_their_own():
    assert types([("output.weight", (256, 32), T.F16)], architecture="falcon") == [T.Q8_0]
    assert type_of("blk.0.attn_k_b.weight", (64, 64, 4)) == SPK4
    assert type_of("blk.0.attn_k_b.weight", (64, 64, 4), architecture="glm5-next") == T.F16
    assert type_of("blk.0.attn_q_b.weight", (64, 64), architecture="glm5-next") == T.Q8_0


def test_quantized_source_never_grows_for_nothing():
    assert type_of("output.weight", (256, 32), T.Q4_0, output=False) == T.Q4_0
    assert type_of("output.weight", (256, 32), T.Q8_0, output=False) == T.Q6_K
    assert type_of("output.weight", (96, 32), T.Q8_0, output=False) == T.Q8_0
    # a linear layer spikes even then: that is what the conversion is for
    assert type_of("blk.0.attn_k.weight", (256, 32), T.Q2_K) == SPK4


def test_pure_makes_embeddings_and_output_spike():
    tensors = [
        ("token_embd.weight", (64, 32), T.F16),
        ("output.weight", (64, 32), T.F16),
        ("norm.weight", (64,), T.F32),
    ]
    assert types(tensors, pure=True) == [SPK4, SPK4, T.F32]


# ---- what the user wants


def test_last_matching_rule_counts():
    rules = ["attn=q8_0", "attn_k=Q4_K", "attn_v=f16", r"blk\.0\.attn_v=bf16"]
    names = ["blk.0.attn_output.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"]
    assert types([(name, (256, 4), T.F32) for name in names], [*rules, "blk.9=spk4"]) == [
        T.Q8_0,
        T.Q4_K,
        T.BF16,
    ]


def test_rule_for_rows_that_do_not_fit_falls_back():
    assert type_of("blk.0.attn_k.weight", (96, 4), rules=["attn_k=q4_k"]) == T.Q5_0
    assert type_of("blk.0.attn_k.weight", (96, 4), rules=["attn_k=spk4"]) == T.Q4_0


@pytest.mark.parametrize(
    "rule, message",
    [
        ("attn_k", "not of the form"),
        ("=q8_0", "not of the form"),
        ("attn_k=", "not of the form"),
        ("attn_k=q9_9", "no type to quantize to"),
        ("attn_k=q8_1", "no type to quantize to"),
        ("attn_k=spka", "no type to quantize to"),
        ("attn_(k=q8_0", "expression is wrong"),
        ("attn_z=q8_0", "matches no tensor"),
        ("attn_norm=q8_0", "matches no tensor that can be quantized"),
        ("attn_k=iq2_xxs", "needs an importance matrix"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(InputError, match=message) as error:
        types([("blk.0.attn_norm.weight", (64,), T.F32), ("blk.0.attn_k.weight", (256, 4), T.F32)], [rule])
    assert error.value.remedy


def test_types_that_need_an_importance_matrix():
    assert (
        type_of("blk.0.attn_k.weight", (256, 4), rules=["attn_k=iq2_xxs"], has_importance=True) == T.IQ2_XXS
    )


def test_nothing_to_quantize():
    with pytest.raises(UnsupportedError, match="no tensor of this model can become SPK4"):
        make_plan("llama", [("blk.0.attn_q.weight", (32, 32), T.F32)])
    with pytest.raises(UnsupportedError):
        make_plan("llama", [("blk.0.attn_q.weight", (64, 64), T.F32)], parse_type_rules([".*=q8_0"]))


# ---- the plan itself


def test_totals_and_lines():
    planned = make_plan("llama", [Q, ("output.weight", (256, 32), T.F16), ("n_norm.weight", (64,), T.F32)])
    assert planned.source_bytes == 2 * 64 * 64 + 2 * 256 * 32 + 4 * 64
    assert planned.target_bytes == 64 * 36 + 32 * 210 + 4 * 64
    assert planned.bits_per_weight == pytest.approx(8 * planned.target_bytes / (64 * 64 + 256 * 32 + 64))
    lines = planned.lines()
    assert len(lines) == 3 + 2
    for tensor, line in zip(planned.tensors, lines, strict=False):
        assert tensor.name in line and tensor.reason in line
        assert f"{tensor.source_type.name} -> {tensor.target_type.name}" in line
    assert "1 of 3 tensors become SPK4" in lines[3] and f"{planned.bits_per_weight:.2f} bits" in lines[4]
    document = json.loads(json.dumps(planned.to_json()))
    assert (
        document["tensors"][0]["target_type"] == "SPK4" and document["target_bytes"] == planned.target_bytes
    )


def test_quantized_sources_are_warned_about():
    assert make_plan("llama", [Q]).warnings == ()
    assert make_plan("llama", [(Q[0], (256, 64), T.Q8_0)]).warnings == ()
    (warning,) = make_plan("llama", [(Q[0], (256, 64), T.Q4_K)]).warnings
    assert "Q4_K" in warning
