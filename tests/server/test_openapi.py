"""The OpenAPI document: valid, complete, and of one mind with the validation."""

import json

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from server.openapi import openapi
from server.protocol import ApiError, detokenize, dumps, tokenize
from server.replies import REPLIES
from tests.server.samples import NAME, make_served
from tests.server.test_fields import ENDPOINTS

SERVED = make_served()
DOCUMENT = openapi(SERVED)
SCHEMAS = DOCUMENT["components"]["schemas"]
REQUESTS = {"chat": "ChatCompletionRequest", "completion": "CompletionRequest"}


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(SCHEMAS[name])


def test_the_document_is_valid_openapi_and_json():
    OpenAPIV31SpecValidator(json.loads(dumps(DOCUMENT))).validate()
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_of_the_contract_is_there():
    assert {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods} == {
        (f"/project/p-{{Project_Id}}/genai/{NAME}/v1/chat/completions", "post"),
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"), ("/v1/models", "get"), ("/v1/models/{id}", "get"), ("/tokenize", "post"),
        ("/detokenize", "post"), ("/health", "get"), ("/ready", "get"), ("/version", "get"),
        ("/metrics", "get"),
        ("/openapi.json", "get"), ("/", "get")}


def test_the_documented_route_asks_for_project_id():
    [operation] = DOCUMENT["paths"][f"/project/p-{{Project_Id}}/genai/{NAME}/v1/chat/completions"].values()
    assert [(one["name"], one["in"], one["required"], one["schema"]) for one in operation["parameters"]] == [
        ("Project_Id", "path", True, {"type": "integer"}), ("project_id", "query", True, {"type": "integer"})]


def test_names_and_prefix_are_those_that_are_served():
    document = openapi(make_served(names=("a", "b")), "/gateway")
    assert document["servers"] == [{"url": "/gateway"}]
    for name in ("a", "b"):
        assert f"/project/p-{{Project_Id}}/genai/{name}/v1/chat/completions" in document["paths"]
    OpenAPIV31SpecValidator(document).validate()


def test_every_operation_answers_with_what_the_contract_lists():
    errors = {"400", "401", "403", "404", "408", "411", "413", "415", "417", "429", "431", "500", "501", "503",
              "505"}
    of_every_request = errors - {"404", "411", "415", "429"}
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert of_every_request <= set(operation["responses"]) - {"200"} <= errors
            assert method == "get" or set(operation["responses"]) == errors | {"200"}
            assert (operation["security"] == []) == (path in ("/", "/health", "/ready", "/version"))
    for path in ("/health", "/ready"):  # not the error's shape
        schema = DOCUMENT["paths"][path]["get"]["responses"]["503"]["content"]["application/json"]["schema"]
        assert schema == {"type": "object"}
    responses = DOCUMENT["components"]["responses"]
    assert {status for status, response in responses.items() if "headers" in response} == {"429", "503"}


def test_defaults_are_those_of_the_checkpoint():
    fields = SCHEMAS["ChatCompletionRequest"]["properties"]
    assert fields["temperature"]["default"] == 0.6 and fields["model"]["default"] == NAME
    assert SCHEMAS["CompletionRequest"]["properties"]["max_tokens"]["default"] == 16


def _rows():
    for endpoint, (parse, body, rows) in ENDPOINTS.items():
        for name, good, bad, *besides in rows:
            for value in [*good, *bad]:
                yield pytest.param(endpoint, parse, body(**(besides[0] if besides else {}) | {name: value}),
                                   id=f"{endpoint}-{name}-{json.dumps(value)[:40]}")


# What JSON Schema cannot say, or this one does not: fields that need one another, the context, ids as keys, what is
# a schema or a grammar.
BEYOND_SCHEMAS = ("context_length_exceeded", "content is missing", "is a wrong key", "needs",
                  "echo, which only scores", "none of the tools", "json_schema is missing", "unsupported_schema",
                  "guided_json must be", "guided_json.type must be", "cannot be followed")


@pytest.mark.parametrize(("endpoint", "parse", "body"), list(_rows()))
def test_the_document_takes_what_the_server_takes(endpoint, parse, body):
    documented = validator(REQUESTS[endpoint]).is_valid(json.loads(body))
    try:
        parse(body, SERVED)
        taken = True
    except ApiError as error:
        taken = False
        if any(words in f"{error.code} {error.message}" for words in BEYOND_SCHEMAS):
            return
    assert documented == taken


def test_short_answers_are_as_documented():
    answers = {"Model": SERVED.model(NAME), "ModelList": SERVED.models(),
               "Tokenized": tokenize(b'{"prompt":"Hello"}', SERVED),
               "Detokenized": detokenize(b'{"tokens":[5]}', SERVED),
               "Error": ApiError(404, "no").body()}
    for name, reply in answers.items():
        REPLIES[name].check(reply, ())
        validator(name).validate(reply)
