"""generation_config.json: defaults, ends of a turn, and refusals that name the file."""

import json

import pytest

from llama.engine.request import SamplingParams
from llama.generation_config import read_generation_config
from llama.strict_json import ConfigError

# As published beside Llama 3.1 8B Instruct.
PUBLISHED = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009],
             "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"}
USUAL = SamplingParams(temperature=0.6, top_p=0.9, top_k=-1, repetition_penalty=1.0)


def read(directory, **content):
    (directory / "generation_config.json").write_text(json.dumps(content))
    return read_generation_config(directory)


def test_what_is_published_is_read(tmp_path):
    assert read(tmp_path, **PUBLISHED) == (USUAL, (128001, 128008, 128009))


def test_without_the_file_it_is_as_published_and_names_no_end(tmp_path):
    assert read_generation_config(tmp_path) == (USUAL, ())


@pytest.mark.parametrize("fields", [{}, dict.fromkeys(PUBLISHED)], ids=["absent", "null"])
def test_what_is_open_is_as_published(tmp_path, fields):
    assert read(tmp_path, **fields) == (USUAL, ())


def test_every_default_is_read(tmp_path):
    defaults, ends = read(tmp_path, temperature=1.5, top_p=0.5, top_k=40, repetition_penalty=1.2, eos_token_id=7)
    assert defaults == SamplingParams(temperature=1.5, top_p=0.5, top_k=40, repetition_penalty=1.2)
    assert ends == (7,)


def test_without_sampling_it_is_greedy(tmp_path):
    assert read(tmp_path, do_sample=False, temperature=0.6)[0].temperature == 0


def test_a_top_k_of_0_is_off(tmp_path):
    assert read(tmp_path, top_k=0)[0].top_k == -1


@pytest.mark.parametrize("fields, problem", [
    ({"temperature": 3}, "temperature must be a number from 0 to 2, not 3"),
    ({"temperature": "warm"}, "temperature must be a number from 0 to 2, not 'warm'"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
    ({"top_k": 1.5}, "top_k must be an integer at least -1, not 1.5"),
    ({"repetition_penalty": -1}, "repetition_penalty must be a number above 0 and at most 2, not -1"),
    ({"eos_token_id": "<|eot_id|>"}, "eos_token_id must be a token id or a list of them, not '<|eot_id|>'")])
def test_what_cannot_be_is_refused_by_file_and_field(tmp_path, fields, problem):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **fields)
    assert str(caught.value) == f"{tmp_path / 'generation_config.json'}: {problem}"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"top_p": 1, "top_p": 2}', "\udcff"])
def test_what_is_no_json_object_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match="generation_config.json"):
        read_generation_config(tmp_path)
