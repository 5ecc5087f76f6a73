"""Configurations that are refused, each by a sentence that names the field or the file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.config import LlamaConfig
from llama.strict_json import ConfigError, read_json_object
from tests.test_config import INSTRUCT_8B, PARAMS_8B, SCALING

GONE = object()  # the field is left out
NAN, INFINITY = float("nan"), float("inf")

REFUSED = [
    # What this code does not compute.
    ("model_type", "mistral", "model_type 'mistral' is not supported; this code computes 'llama'"),
    ("model_type", GONE, "model_type is missing; a Llama checkpoint says \"llama\""),
    ("architectures", ["LlamaForSequenceClassification"],
     "['LlamaForSequenceClassification'] is not supported; this code computes ['LlamaForCausalLM']"),
    ("architectures", "LlamaForCausalLM", "architectures 'LlamaForCausalLM' is not supported"),
    ("hidden_act", "gelu", "hidden_act 'gelu' is not supported; this code computes 'silu'"),
    ("attention_bias", True, "attention_bias True is not supported; this code computes False"),
    ("attention_bias", 0, "attention_bias 0 is not supported; this code computes False"),
    ("mlp_bias", True, "mlp_bias True is not supported; this code computes False"),
    ("attention_dropout", 0.1, "attention_dropout 0.1 is not supported; this code computes 0"),
    ("pretraining_tp", 2, "pretraining_tp 2 is not supported; this code computes 1"),
    ("pretraining_tp", True, "pretraining_tp True is not supported; this code computes 1"),
    ("quantization_config", {"quant_method": "gptq"},
     "quantization_config {'quant_method': 'gptq'} is not supported"),
    ("sliding_window", 4096, "sliding_window 4096 is not supported; this code computes None"),
    ("is_encoder_decoder", True, "is_encoder_decoder True is not supported"),
    ("add_cross_attention", True, "add_cross_attention True is not supported"),
    ("partial_rotary_factor", 0.5, "'partial_rotary_factor' (0.5) is not a setting that this code knows; "),
    ("num_experts", 8, "'num_experts' (8) is not a setting that this code knows"),
    ("torch_dtype", "float8_e4m3fn",
     "dtype 'float8_e4m3fn' is not supported; use one of float32, bfloat16, float16"),
    ("dtype", ["bfloat16"], "dtype ['bfloat16'] is not supported"),
    # Rotary positions.
    ("rope_scaling", SCALING | {"rope_type": "yarn"},
     "rope_type 'yarn' is not supported; this code computes 'llama3' and 'default'"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
    ("rope_scaling", {"rope_type": "longrope"}, "rope_type 'longrope' is not supported"),
    ("rope_scaling", {"rope_type": ["llama3"]}, "rope_type ['llama3'] is not supported"),
    ("rope_scaling", {"factor": 8.0}, "rope_type None is not supported"),
    ("rope_scaling", "llama3", "rope_scaling must be an object, not 'llama3'"),
    ("rope_parameters", [8.0], "must be an object, not [8.0]"),
    ("rope_scaling", SCALING | {"attention_factor": 1.0},
     "rope_scaling.attention_factor is not a setting of rope_type 'llama3'"),
    ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5},
     "rope_scaling.partial_rotary_factor is not a setting of rope_type 'default'"),
    ("rope_scaling", {k: v for k, v in SCALING.items() if k != "factor"}, "rope_scaling.factor is missing"),
    ("rope_scaling", {k: v for k, v in SCALING.items() if k != "original_max_position_embeddings"},
     "rope_scaling.original_max_position_embeddings is missing"),
    ("rope_scaling", SCALING | {"factor": "8"}, "rope_scaling.factor must be a finite number, not '8'"),
    ("rope_scaling", SCALING | {"factor": 0.5}, "is out of range: factor at least 1"),
    ("rope_scaling", SCALING | {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
     "0 < low_freq_factor < high_freq_factor"),
    ("rope_scaling", SCALING | {"low_freq_factor": 0.0}, "0 < low_freq_factor < high_freq_factor"),
    ("rope_scaling", SCALING | {"original_max_position_embeddings": 0},
     "original_max_position_embeddings at least 1"),
    ("rope_parameters", SCALING,
     "rope_parameters and rope_scaling are both given; keep the one that is meant"),
    ("rope_parameters", {"rope_theta": 500000.0}, "rope_parameters and rope_scaling are both given"),
    ("rope_scaling", SCALING | {"rope_theta": 10000.0},
     "rope_theta is 500000.0 but rope_scaling.rope_theta is 10000.0; keep the one that is meant"),
    ("rope_theta", GONE, "rope_theta is missing"),
    ("rope_theta", 1, "rope_theta is 1.0; it must be above 1"),
    ("rope_theta", INFINITY, "rope_theta must be a finite number, not inf"),
    ("rope_theta", 10**400, "rope_theta must be a finite number, not 1000"),
    # Sizes.
    ("hidden_size", GONE, "hidden_size is missing"),
    ("vocab_size", None, "vocab_size is missing"),
    ("num_hidden_layers", GONE, "num_hidden_layers is missing"),
    ("num_hidden_layers", "32", "num_hidden_layers must be an integer, not '32'"),
    ("num_hidden_layers", 32.0, "num_hidden_layers must be an integer, not 32.0"),
    ("num_hidden_layers", True, "num_hidden_layers must be an integer, not True"),
    ("num_hidden_layers", 0, "layers is 0; it must be at least 1"),
    ("intermediate_size", -1, "intermediate_size is -1; it must be at least 1"),
    ("num_attention_heads", 0, "num_attention_heads is 0; it must be at least 1"),
    ("num_attention_heads", 30, "hidden_size 4096 is not a multiple of num_attention_heads 30"),
    ("num_key_value_heads", 5, "32 query heads cannot share 5 key/value heads evenly"),
    ("num_key_value_heads", 0, "heads is 0; it must be at least 1"),
    ("head_dim", 127, "head_dim is 127; rotary embeddings need an even number"),
    ("head_dim", 0, "head_dim is 0; it must be at least 1"),
    ("head_dim", [128], "head_dim must be an integer, not [128]"),
    ("max_position_embeddings", GONE, "max_position_embeddings is missing"),
    ("rms_norm_eps", GONE, "rms_norm_eps is missing"),
    ("rms_norm_eps", NAN, "rms_norm_eps must be a finite number, not nan"),
    ("rms_norm_eps", True, "rms_norm_eps must be a finite number, not True"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps must be a finite number, not '1e-5'"),
    ("rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05; it must be above 0"),
    ("rms_norm_eps", 0, "rms_norm_eps is 0.0; it must be above 0"),
    ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, not 1"),
    ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, not 'false'"),
    # Token ids.
    ("bos_token_id", "<s>", "bos_token_id must be an integer, not '<s>'"),
    ("bos_token_id", -1, "bos_token_id is -1; it must be at least 0"),
    ("eos_token_id", True, "eos_token_id must be a token id or a list of them, not True"),
    ("eos_token_id", [128001, "128009"], "eos_token_id must be a token id or a list of them"),
    ("eos_token_id", [128001, -1], "eos_token_id must be a token id or a list of them"),
    ("eos_token_id", 1.0, "eos_token_id must be a token id or a list of them, not 1.0"),
]
REFUSED_PARAMS = [
    ("quantization_args", {"group_size": 32}, "'quantization_args' is not a setting that this code knows"),
    ("vision_chunk_size", 448, "'vision_chunk_size' is not a setting that this code knows"),
    ("dim", GONE, "dim is missing"),
    ("dim", 4095, "dim 4095 is not a multiple of n_heads 32"),
    ("n_heads", 0, "dim 4096 is not a multiple of n_heads 0"),
    ("n_kv_heads", 3, "32 query heads cannot share 3 key/value heads evenly"),
    ("vocab_size", -1, "vocab_size is -1; it must be at least 1"),
    ("multiple_of", 0, "multiple_of is 0; it must be at least 1"),
    ("ffn_dim_multiplier", -1.0, "ffn_dim_multiplier is -1.0"),
    ("ffn_dim_multiplier", 1e308, "ffn_dim_multiplier is 1e+308"),
    ("norm_eps", "small", "norm_eps must be a finite number, not 'small'"),
    ("norm_eps", 0.0, "norm_eps is 0.0; it must be above 0"),
    ("rope_theta", None, "rope_theta is missing"),
    ("rope_theta", 0.0, "rope_theta is 0.0; it must be above 1"),
    ("use_scaled_rope", 1, "use_scaled_rope must be true or false, not 1"),
]
REFUSED_FILES = {
    "empty": (b"", "is not valid JSON: Expecting value"),
    "cut short": (b'{"model_type": "llama"', "is not valid JSON"),
    "a list": (b"[1, 2]", "must hold a JSON object, not a list"),
    "null": (b"null", "must hold a JSON object, not a NoneType"),
    "not UTF-8": (b'{"model_type": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    "a byte order mark": (b'\xef\xbb\xbf{"model_type": "llama"}', "is not valid JSON: Unexpected UTF-8 BOM"),
    "nested too deep": (b'{"a":' + b"[" * 200_000, "is not valid JSON: maximum recursion depth"),
    "an endless integer": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    "a repeated key": (b'{"a": {"b": 1, "b": 2}}', "is not valid JSON: the key 'b' stands twice"),
}


def changed(raw: dict, name: str, value: object) -> dict:
    """`raw` with one field set, or left out."""
    rest = {key: kept for key, kept in raw.items() if key != name}
    return rest if value is GONE else rest | {name: value}


def names(cases: list[tuple]) -> list[str]:
    """Short test ids."""
    return [f"{name}-{'gone' if value is GONE else str(value)[:20]}" for name, value, _ in cases]


@pytest.mark.parametrize("name, value, sentence", REFUSED, ids=names(REFUSED))
def test_config_json_is_refused_by_name(name, value, sentence):
    with pytest.raises(ConfigError) as refusal:
        LlamaConfig.from_dict(changed(INSTRUCT_8B, name, value))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("name, value, sentence", REFUSED_PARAMS, ids=names(REFUSED_PARAMS))
def test_params_json_is_refused_by_name(name, value, sentence):
    with pytest.raises(ConfigError) as refusal:
        LlamaConfig.from_params(changed(PARAMS_8B, name, value))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_is_not_a_json_object_is_refused_by_its_path(tmp_path, case):
    content, sentence = REFUSED_FILES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        LlamaConfig.from_directory(tmp_path)
    assert str(refusal.value).startswith(f"{path} ") and sentence in str(refusal.value)
    assert str(refusal.value).count(str(path)) == 1


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_json_object(tmp_path)


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds neither config.json nor params.json; name the directory"):
        LlamaConfig.from_directory(tmp_path)


@pytest.mark.parametrize("file, content", [("config.json", INSTRUCT_8B), ("params.json", PARAMS_8B)])
def test_a_refusal_names_the_file_it_was_read_from(tmp_path, file, content):
    (tmp_path / file).write_text(json.dumps(content | {"vocab_size": "many"}))
    with pytest.raises(ConfigError) as refusal:
        LlamaConfig.from_directory(tmp_path)
    assert str(refusal.value) == f"{tmp_path / file}: vocab_size must be an integer, not 'many'"


keys = st.sampled_from([*SCALING, "type", "rope_theta"]) | st.text(max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=5)
# The values that pass one check, to reach the next.
plausible = st.sampled_from([0, 1, -1, 2, 8192, 1e-5, 0.5, 1e308, "llama3", "default", SCALING, True, None])
fields = st.sampled_from([*INSTRUCT_8B, "head_dim", "dtype", "rope_parameters", "quantization_config"])


@settings(max_examples=400)
@given(fields, json_values | plausible)
def test_any_value_of_any_field_is_read_or_refused_and_never_crashes(name, value):
    read_or_refused(LlamaConfig.from_dict, INSTRUCT_8B | {name: value})


@settings(max_examples=300)
@given(st.sampled_from([*PARAMS_8B]), json_values | plausible)
def test_any_value_of_any_parameter_is_read_or_refused_and_never_crashes(name, value):
    read_or_refused(LlamaConfig.from_params, PARAMS_8B | {name: value})


def read_or_refused(read, raw: dict) -> None:
    """What is read must be whole: its sizes can be computed with."""
    try:
        config = read(raw)
    except ConfigError as refusal:
        assert str(refusal)
    else:
        assert config.num_parameters > 0 and config.rms_norm_eps > 0 and config.rope_theta > 1
        assert config.dtype in ("float32", "bfloat16", "float16")
