"""Keys in URLs do not appear in uvicorn's access log, whoever configures it, and in which form."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator

import httpx
import pytest
from support.server.admin import FakeControl, serving_app

from peanut_serve.signals.json_logs import JsonFormatter
from peanut_serve.signals.redaction import hide_keys, without_keys
from peanut_serve.tenants.keys import new_token
from peanut_serve.web.admin import admin_app


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models?", "/v1/models?"),
        ("/v1/models?api_key=secret", "/v1/models?api_key=***"),
        ("/v1/models?a=secret&b=secret&c", "/v1/models?a=***&b=***&***"),
        ("/v1/models?secret", "/v1/models?***"),
        ("/v1/models?a=b=secret?x=secret", "/v1/models?a=***"),
        ("/v1/{token}/models", "/v1/peanut_***/models"),
        ("/v1/models/peanut_small", "/v1/models/peanut_small"),
    ],
)
def test_what_a_log_may_have(path: str, shown: str) -> None:
    assert without_keys(path.format(token=new_token())) == shown


@pytest.fixture
def access_log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("uvicorn.access")
    before = logger.filters[:], logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.filters, logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_of_a_server(access_log: logging.Logger, form: str) -> None:
    hide_keys()
    hide_keys()
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {"uvicorn.access": {}}})
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter() if form == "json" else None)
    access_log.handlers, access_log.propagate = [handler], False
    access_log.setLevel(logging.INFO)
    with serving_app(admin_app(FakeControl(), "key")) as url:
        assert httpx.get(f"{url}/healthz?api_key=a-secret&peanut_key=secret").status_code == 200
    text = written.getvalue()
    assert "GET /healthz?api_key=***&peanut_key=*** HTTP/1.1" in text
    assert "secret" not in text
    if form == "json":
        assert json.loads(text)["path"] == "/healthz?api_key=***&peanut_key=***"
