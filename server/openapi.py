"""The contract as an OpenAPI 3.1 document, made from the tables by which requests are checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama import __version__
from server.replies import REPLIES
from server.served import Served

_ERRORS = {
    400: "something in the request must change: `param` says what",
    401: "the API key is missing or wrong",
    403: "a Host or an Origin from which the server may not be used",
    404: "no such path, or no such model",
    408: "the request came too slowly",
    411: "a body needs Content-Length, or chunked Transfer-Encoding",
    413: "the body is larger than the server takes",
    415: "the body must be application/json",
    417: "an expectation other than 100-continue",
    429: "the queue is full",
    431: "the headers are larger than the server takes",
    500: "a defect of the server",
    501: "a framing of the body that the server does not take",
    503: "the model is loading, the server is stopping, the engine was lost, or connections are too many",
    505: "an HTTP version other than 1.0 and 1.1",
}
_MAY_RETRY = (429, 503)
_OF_BODIES = (411, 415, 429)
_OF_GET = tuple(status for status in _ERRORS if status not in (404, *_OF_BODIES))


def openapi(served: Served, root_path: str = "") -> dict[str, Any]:
    """The document, for the model that is served and the prefix that all paths stand under."""
    requests = {"ChatCompletionRequest": served.chat_request, "CompletionRequest": served.completion_request,
                "TokenizeRequest": served.tokenize_request, "DetokenizeRequest": served.detokenize_request}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama", "version": __version__,
                 "description": "Text from Llama 3.1, in a dialect of the OpenAI API. Fields that are not "
                                "listed are refused."},
        "servers": [{"url": root_path or "/"}],
        "paths": _paths(served),
        "components": {
            "schemas": {name: type.schema() for name, type in (requests | dict(REPLIES)).items()},
            "responses": {str(status): _error(status, text) for status, text in _ERRORS.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer",
                                        "description": "only where the server was started with an API key"}},
        },
    }


def _paths(served: Served) -> dict[str, Any]:
    project = [
        {"name": "Project_Id", "in": "path", "required": True, "schema": {"type": "integer"}},
        {"name": "project_id", "in": "query", "required": True, "schema": {"type": "integer"},
         "description": "the same as in the path"},
    ]
    chat = ("chat", "Answer a conversation", "ChatCompletionRequest", "ChatCompletion", "ChatCompletionChunk")
    model = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths = {f"/project/p-{{Project_Id}}/genai/{name}/v1/chat/completions":
             _post(f"project_{chat[0]}_{number}", *chat[1:], parameters=project)
             for number, name in enumerate(served.names)}
    if served.has_traces:
        paths["/v1/traces/{id}"] = _get("trace", "What x_trace caught, if it was large: a safetensors file",
                                        {"application/octet-stream": {}}, parameters=[model], errors=(404, *_OF_GET))
    return paths | {
        "/v1/chat/completions": _post(*chat),
        "/v1/completions": _post("completion", "Continue texts", "CompletionRequest", "Completion",
                                 "CompletionChunk"),
        "/v1/models": _get("models", "The models that are served", _json("ModelList")),
        "/v1/models/{id}": _get("model", "One of them", _json("Model"), parameters=[model],
                                errors=(404, *_OF_GET)),
        "/tokenize": _post("tokenize", "Text or a conversation to token ids", "TokenizeRequest", "Tokenized"),
        "/detokenize": _post("detokenize", "Token ids to text", "DetokenizeRequest", "Detokenized"),
        "/health": _probe("health", "Whether the server lives: the engine answers"),
        "/ready": _probe("ready", "Whether requests are taken"),
        "/version": _get("version", "The server's version", _object(), is_open=True),
        "/metrics": _get("metrics", "Counters and histograms for Prometheus", {"text/plain": _string()}),
        "/openapi.json": _get("openapi", "This document", _object()),
        "/": _get("page", "The web page", {"text/html": _string()}, is_open=True),
    }


def _post(name: str, summary: str, request: str, reply: str, chunk: str | None = None,
          parameters: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    content = _json(reply)
    description = "done"
    if chunk is not None:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events
        description = f"the whole answer; with `stream`, server-sent events: each a {chunk}, the last [DONE]"
    operation = _operation(name, summary, description, content, tuple(_ERRORS), parameters)
    return {"post": operation | {"requestBody": {"required": True, "content": _json(request)}}}


def _get(name: str, summary: str, content: dict[str, Any], *, parameters: Sequence[Mapping[str, Any]] = (),
         errors: Sequence[int] = _OF_GET, is_open: bool = False) -> dict[str, Any]:
    operation = _operation(name, summary, "done", content, errors, parameters)
    return {"get": operation | {"security": []} if is_open else operation}


def _probe(name: str, summary: str) -> dict[str, Any]:
    """What says the same in either case, and by its status which it is."""
    probe = _get(name, summary, _object(), is_open=True)
    probe["get"]["responses"]["503"] = {"description": "it is not so", "content": _object()}
    return probe


def _operation(name: str, summary: str, description: str, content: dict[str, Any], errors: Sequence[int],
               parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    responses = {"200": {"description": description, "content": content}}
    responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in errors}
    operation = {"operationId": name, "summary": summary, "security": [{"key": []}, {}],
                 "responses": responses}
    return operation | {"parameters": list(parameters)} if parameters else operation


def _error(status: int, description: str) -> dict[str, Any]:
    response = {"description": description, "content": _json("Error")}
    if status in _MAY_RETRY:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return response


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _object() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}


def _string() -> dict[str, Any]:
    return {"schema": {"type": "string"}}
