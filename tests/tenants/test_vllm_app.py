"""vLLM's own app, without an engine: which routes answer the key of a tenant, and that its own check is gone."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.server.tenants import entry, token_of, write_keys

from peanut_serve.settings.server import VARIABLE, ServerSettings
from peanut_serve.web.routes import Access, access_to

pytestmark = pytest.mark.slow  # vLLM is imported

OWN_KEY = "a key of VLLM_API_KEY"
NAMES = ("base", "v1", "v2")
WRONG = ({"model": "v2"}, {"model": "base"}, {"model": "none"}, {})


class Server:
    """Stands for the `VariantServer`: names, and nothing that could answer."""

    base_name = "base"
    catalogue = SimpleNamespace(bases={"base": None}, records=SimpleNamespace(variants={}))

    def has(self, name: str) -> bool:
        return name in NAMES

    async def names(self) -> list[str]:
        return list(NAMES)

    def record_end(self, name: str, outcome: str, seconds: float) -> None:
        """Nothing is kept."""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from peanut_serve.vllm_plugin.swap.models import serve_variants

    file = write_keys(tmp_path / "keys.json", entry("one", variants=["v1"]), entry("all"))
    settings = ServerSettings(mode="merged", roots=(), state=tmp_path, cache=tmp_path, keys=file)
    monkeypatch.setenv(VARIABLE, settings.model_dump_json())
    monkeypatch.setenv("VLLM_PLUGINS", "peanut_serve_variants")
    monkeypatch.setenv("VLLM_API_KEY", OWN_KEY)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(args, ("generate", "embed", "classify", "render"))
    server: Any = Server()
    models: Any = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="base", model_path="/models/base")],
        model_config=SimpleNamespace(max_model_len=64),
    )
    serve_variants(models, server)
    app.state.peanut_variants, app.state.openai_serving_models = server, models
    yield app


def ask(app: Any, method: str, path: str, key: str, body: object = None) -> httpx.Response:
    async def sent() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers={"Authorization": f"Bearer {key}"}, json=body)

    return asyncio.run(asyncio.wait_for(sent(), 60))


def test_the_keys_of_the_file_pass_vllm(app: Any) -> None:
    def listed(key: str) -> list[str]:
        return [model["id"] for model in ask(app, "GET", "/v1/models", key).json()["data"]]

    assert listed(token_of("one")) == ["v1"]
    assert listed(token_of("all")) == list(NAMES)
    assert listed(OWN_KEY) == list(NAMES)
    for key in ("wrong", entry("one")["sha256"]):
        refused = ask(app, "GET", "/v1/models", key)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "UnauthorizedError")


def test_no_route_of_vllm_answers_for_another_variant(app: Any) -> None:
    asked = 0
    for route in app.routes:
        path = route.path.replace("{", "").replace("}", "")
        if access_to(route.path) is Access.OPEN:
            continue
        for method in getattr(route, "methods", None) or ():
            for body in WRONG if method == "POST" else ({},):
                status = ask(app, method, path, token_of("one"), body).status_code
                if method != "POST" and access_to(route.path) is Access.NAMES:
                    assert path == "/v1/models"  # it lists v1: see above
                    continue
                assert status in (403, 404), (method, path, body, status)
                assert status == 403 or access_to(route.path) is Access.REFUSED, (method, path)
                asked += 1
    assert asked > 60
