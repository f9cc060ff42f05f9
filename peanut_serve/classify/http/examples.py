"""Bodies of requests and answers for the OpenAPI description."""

from typing import Any

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error", "type"],
    "properties": {"error": {"type": "string"}, "type": {"type": "string"}},
}
ERROR: dict[str, Any] = {
    "description": "A refusal, with a sentence that says why.",
    "content": {
        "application/json": {
            "schema": _ERROR_SCHEMA,
            "example": {
                "error": "there is no task pets; the available tasks are flowers",
                "type": "UnknownVariantError",
            },
        }
    },
}

_ANYTHING: dict[str, Any] = {}
HUGGING_FACE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "inputs": {"description": "A text, an image or a sound in base64, or a list of them."},
                    "parameters": {"type": "object"},
                },
            },
            "examples": {
                "a text": {"value": {"inputs": "A well executed spy thriller.", "parameters": {"top_k": 1}}},
                "a pair of texts": {"value": {"inputs": {"text": "It rains.", "text_pair": "It is wet."}}},
                "a question": {"value": {"inputs": {"question": "Who was in Paris?",
                                                    "context": "Angela Merkel was in Paris."}}},
                "entities": {"value": {"inputs": "Angela Merkel was in Paris.",
                                       "parameters": {"aggregation_strategy": "simple"}}},
                "embeddings": {"value": {"inputs": ["good film", "bad film"], "normalize": True}},
            },
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "audio/wav": {"schema": {"type": "string", "format": "binary"}},
    },
}  # fmt: skip
HUGGING_FACE_ANSWER: dict[str, Any] = {
    "description": "Labels with scores, entities, answers, or features.",
    "content": {"application/json": {"schema": _ANYTHING, "example": [{"label": "beagle", "score": 0.97}]}},
}
INFER_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {"type": "array", "items": {"type": "object"}},
                    "outputs": {"type": "array", "items": {"type": "object"}},
                    "parameters": {"type": "object"},
                },
            },
            "examples": {
                "texts": {"value": {"inputs": [
                    {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["good film", "bad film"]}
                ]}},
                "tensors": {"value": {"inputs": [
                    {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": [101, 2204, 102]},
                    {"name": "attention_mask", "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]},
                ]}},
            },
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}  # fmt: skip
INFER_ANSWER: dict[str, Any] = {
    "description": "The outputs of the graph; scores of classifiers, and lengths of outputs by token.",
    "content": {
        "application/json": {
            "schema": _ANYTHING,
            "example": {
                "model_name": "pets",
                "model_version": "0f3c",
                "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -1.5]}],
            },
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
