"""The configuration: every published spelling gives the published numbers. Refusals: test_config_refusals."""

import copy
import dataclasses
import json

import llama_models.sku_list
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llama.config import LlamaConfig, RopeScaling
from llama.strict_json import read_token_ids

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192, "rope_type": "llama3"}
INSTRUCT_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}
PARAMS_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
             "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0,
             "use_scaled_rope": True}


def published(hidden, layers, heads, kv_heads, head_dim, intermediate, tied, factor):
    """The configuration of a published shape, with the numbers that all of them share."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=intermediate, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, max_position_embeddings=131072,
        rope_theta=500000.0, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192), rms_norm_eps=1e-5,
        tie_word_embeddings=tied, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009))


# By Meta's names: the shape, its parameters, and the bytes of one position in a bfloat16 KV cache.
PUBLISHED = {
    "Llama3.1-8B": (published(4096, 32, 32, 8, 128, 14336, False, 8.0), 8_030_261_248, 131_072),
    "Llama3.1-70B": (published(8192, 80, 64, 8, 128, 28672, False, 8.0), 70_553_706_496, 327_680),
    "Llama3.1-405B": (published(16384, 126, 128, 8, 128, 53248, False, 8.0), 405_853_388_800, 516_096),
    "Llama3.2-1B": (published(2048, 16, 32, 8, 64, 8192, True, 32.0), 1_235_814_400, 32_768),
    "Llama3.2-3B": (published(3072, 28, 24, 8, 128, 8192, True, 32.0), 3_212_749_824, 114_688),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cache_bytes_are_the_published_ones(name):
    config, parameters, kv_bytes = PUBLISHED[name]
    assert config.num_parameters == parameters
    assert (config.num_weight_bytes(), config.kv_bytes_per_token()) == (2 * parameters, kv_bytes)
    assert config.num_weight_bytes("float32") == 4 * parameters
    assert config.kv_bytes_per_token("float32") == 2 * kv_bytes


@pytest.mark.parametrize("name", [*PUBLISHED, "Llama3.3-70B-Instruct"])
def test_metas_own_params_give_the_published_shapes(name):
    params = llama_models.sku_list.resolve_model(name).arch_args
    expected = PUBLISHED[{"Llama3.3-70B-Instruct": "Llama3.1-70B"}.get(name, name)][0]
    assert LlamaConfig.from_params(params) == expected


def test_params_without_the_scaling_are_llama_3():
    config = LlamaConfig.from_params(PARAMS_8B | {"use_scaled_rope": False})
    assert (config.rope_scaling, config.max_position_embeddings) == (None, 8192)
    assert LlamaConfig.from_params({k: v for k, v in PARAMS_8B.items() if k != "use_scaled_rope"}) == config


def test_config_json_of_8b_instruct():
    assert LlamaConfig.from_dict(INSTRUCT_8B) == PUBLISHED["Llama3.1-8B"][0]


def test_config_json_of_8b_base_has_one_end_token():
    assert LlamaConfig.from_dict(INSTRUCT_8B | {"eos_token_id": 128001}).eos_token_ids == (128001,)


def test_config_json_of_3_2_1b():
    raw = INSTRUCT_8B | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
                         "num_hidden_layers": 16, "rope_scaling": SCALING | {"factor": 32.0},
                         "tie_word_embeddings": True}
    assert LlamaConfig.from_dict(raw) == PUBLISHED["Llama3.2-1B"][0]


def test_head_dim_need_not_be_the_hidden_size_shared_out():
    config = LlamaConfig.from_dict(INSTRUCT_8B | {"head_dim": 64})
    assert (config.head_dim, config.q_size, config.kv_size, config.group_size) == (64, 2048, 512, 4)


def test_newer_exports_write_dtype_and_fold_the_rotary_numbers():
    raw = {name: value for name, value in INSTRUCT_8B.items()
           if name not in ("torch_dtype", "rope_scaling", "rope_theta")}
    raw |= {"dtype": "float16", "rope_parameters": SCALING | {"rope_theta": 500000.0}}
    assert LlamaConfig.from_dict(raw) == LlamaConfig.from_dict(INSTRUCT_8B | {"torch_dtype": "float16"})


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling_is_spelt_in_several_ways(scaling):
    assert LlamaConfig.from_dict(INSTRUCT_8B | {"rope_scaling": scaling}).rope_scaling is None
    folded = {"rope_theta": 10000, **(scaling or {})}
    raw = {k: v for k, v in INSTRUCT_8B.items() if not k.startswith("rope")} | {"rope_parameters": folded}
    config = LlamaConfig.from_dict(raw)
    assert (config.rope_scaling, config.rope_theta) == (None, 10000.0)


def test_both_old_and_new_name_of_the_rope_type_may_stand_side_by_side():
    raw = INSTRUCT_8B | {"rope_scaling": SCALING | {"type": "llama3"}}
    assert LlamaConfig.from_dict(raw) == LlamaConfig.from_dict(INSTRUCT_8B)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_checkpoints_own(dtype):
    config = LlamaConfig.from_dict(INSTRUCT_8B | {"torch_dtype": dtype})
    assert config.dtype == dtype
    assert config.num_weight_bytes() == config.num_parameters * {"float32": 4}.get(dtype, 2)


def test_absent_key_value_heads_mean_one_for_each_query_head():
    raw = {name: value for name, value in INSTRUCT_8B.items() if name != "num_key_value_heads"}
    assert LlamaConfig.from_dict(raw).num_kv_heads == 32


@pytest.mark.parametrize("as_saved", [False, True], ids=["to_dict", "as save_pretrained writes it"])
def test_what_transformers_writes_is_read(as_saved):
    theirs = transformers.LlamaConfig(**copy.deepcopy(INSTRUCT_8B))  # it writes into what it is given
    raw = json.loads(theirs.to_json_string(use_diff=as_saved))
    assert raw["rope_parameters"]["factor"] == 8.0
    assert LlamaConfig.from_dict(raw) == PUBLISHED["Llama3.1-8B"][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_to_dict_writes(name):
    config = PUBLISHED[name][0]
    theirs = transformers.LlamaConfig(**config.to_dict())
    assert LlamaConfig.from_dict(theirs.to_dict()) == config
    assert theirs.rope_parameters["factor"] == config.rope_scaling.factor


sizes = st.integers(1, 2**40)
scalings = st.builds(lambda factor, low, span, original: RopeScaling(factor, low, low + span, original),
                     st.floats(1, 100), st.floats(0.1, 10), st.floats(0.1, 10), sizes)
configs = st.builds(
    lambda group, **fields: LlamaConfig(num_heads=group * fields["num_kv_heads"], **fields),
    group=st.integers(1, 64), vocab_size=sizes, hidden_size=sizes, intermediate_size=sizes, num_layers=sizes,
    num_kv_heads=sizes, head_dim=sizes.map(lambda half: 2 * half), max_position_embeddings=sizes,
    rope_theta=st.floats(1.001, 1e9), rope_scaling=st.none() | scalings,
    rms_norm_eps=st.floats(1e-30, 1e30), tie_word_embeddings=st.booleans(),
    bos_token_id=st.none() | st.integers(0, 2**40), eos_token_ids=st.lists(st.integers(0, 2**40)).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]))


@given(configs)
def test_to_dict_and_from_dict_are_inverse(config):
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("value, ids", [(None, ()), (5, (5,)), ([5, 0], (5, 0)), ([], ())])
def test_token_ids_are_one_or_several_or_none(value, ids):
    assert read_token_ids({"eos_token_id": value}, "eos_token_id") == ids


def test_a_directory_is_read_by_config_json_before_params_json(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS_8B | {"n_layers": 3}))
    assert LlamaConfig.from_directory(tmp_path).num_layers == 3
    (tmp_path / "config.json").write_text(json.dumps(INSTRUCT_8B))
    assert LlamaConfig.from_directory(str(tmp_path)).num_layers == 32


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED["Llama3.1-8B"][0].num_layers = 2
