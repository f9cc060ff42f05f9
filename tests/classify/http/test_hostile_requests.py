"""Clients that mean no good: without a key, with huge, slow, broken and made-up requests. No graph is run here."""

import io
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import given, settings, strategies
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from support.classify.serving import PATIENCE, classifying, digit, raw
from support.classify.stand_ins import stand_in

from peanut_serve.web.request_body import ClientLimits

KEY = "a-key"
LIMITS = ClientLimits(body_bytes=64 << 10, body_seconds=1.0, stall_seconds=1.0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with classifying(
        stand_in(tmp_path_factory.mktemp("served") / "mood"), keys=(KEY, "other"), clients=LIMITS
    ) as found:
        yield found[0]


def ask(url: str, path: str = "/models/mood", key: str | None = KEY, **more: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.request("POST", url + path, headers=headers, timeout=PATIENCE, **{"json": {"inputs": "a"}, **more})


def test_all_but_monitoring_needs_the_key(url: str) -> None:
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for path in ("/models/mood", "/models", "/v2", "/v2/models/mood", "/v2/models/mood/infer", "/nothing"):
            assert client.get(path).status_code == 401, path
        for value in (f"Bearer {KEY}x", KEY, "Bearer", f"Basic {KEY}"):
            found = client.post("/models/mood", headers={"Authorization": value})
            assert found.status_code == 401, value
            assert found.json()["error"].startswith("the API key is missing or wrong")
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200, path


def test_a_broken_graph_is_a_422(url: str) -> None:
    """The graph of a stand-in is no graph."""
    for _ in range(2):
        found = ask(url)
        assert found.status_code == 422
        assert "mood cannot be served" in found.json()["error"]
        assert "x-peanut-digest" not in found.headers
    found = httpx.get(f"{url}/v2/models/mood/ready", headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)
    assert found.status_code == 422


def head(path: str, *lines: str) -> bytes:
    own = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines]
    return "\r\n".join([*own, "", ""]).encode()


def test_a_body_that_is_announced_too_large_is_not_read(url: str) -> None:
    found = raw(url, head("/models/mood", "Content-Type: image/png", f"Content-Length: {1 << 40}"))
    assert found.startswith(b"HTTP/1.1 413")
    assert b"larger than 64 KiB; see --max-body" in found


def test_a_chunked_body_is_refused_when_it_has_become_too_large(url: str) -> None:
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    found = raw(url, head("/models/mood", "Transfer-Encoding: chunked") + chunk * 6)
    assert found.startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_given_up(url: str) -> None:
    start = time.monotonic()
    found = raw(url, head("/models/mood", "Content-Length: 100") + b"a few bytes")
    assert found.startswith(b"HTTP/1.1 408")
    assert 0.9 < time.monotonic() - start < 25


def test_a_compressed_body_is_refused(url: str) -> None:
    bomb = zlib.compress(bytes(10 << 20))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Encoding": "deflate"}
    found = httpx.post(f"{url}/models/mood", content=bomb, headers=headers, timeout=PATIENCE)
    assert found.status_code == 400
    assert "compressed" in found.json()["error"]


@pytest.mark.parametrize(
    "name", ["..%2F..%2Fetc%2Fpasswd", "%00", "mood%2Fconfig.json", "m" * 3000, "%ff", "mood:int4"]
)
def test_a_name_from_a_client_is_no_path(url: str, name: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
        for path in (f"/models/{name}", f"/v2/models/{name}/infer", f"/v2/models/mood/versions/{name}/infer"):
            found = client.post(path, json={"inputs": "a"})
            assert found.status_code == 404, path
            assert len(found.text) < 500


@pytest.mark.slow  # loads an image model
def test_an_image_is_checked_before_it_is_decoded(exports: Path) -> None:
    """A few kilobytes that would become gigabytes, and files that only begin as images."""
    with classifying(exports / "digits", max_pixels=1_000_000) as (url, _):
        assert httpx.post(f"{url}/models/digits", content=digit(1), timeout=PATIENCE).status_code == 200
        for content, said in (
            (png_bomb(30_000), "pixels"),
            (png_bomb(1001), "1001 x 1001 pixels, at most 1000000 are decoded"),
            (digit(1)[:60], "cannot be read as an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be read as an image"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
        ):
            start = time.monotonic()
            found = httpx.post(f"{url}/models/digits", content=content, timeout=PATIENCE)
            assert found.status_code == 422
            assert said in found.json()["error"]
            assert time.monotonic() - start < 20


def png_bomb(side: int) -> bytes:
    """A PNG of zeros, compressed."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + checksum

    size = side.to_bytes(4, "big")
    rows = zlib.compressobj(9)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + b"\x08\x00\x00\x00\x00"))
    content = b"".join(rows.compress(bytes(side + 1)) for _ in range(min(side, 2000))) + rows.flush()
    file.write(chunk(b"IDAT", content) + chunk(b"IEND", b""))
    return file.getvalue()


def test_the_description_has_examples(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json", timeout=PATIENCE).text
    for part in ("A well executed spy thriller.", "text_pair", "input_ids", "aggregation_strategy"):
        assert part in document
    assert "/v2/models/{name}/versions/{version}/infer" in json.loads(document)["paths"]


@pytest.mark.slow  # fuzzes
def test_made_up_requests_are_refused_but_never_fail(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers, timeout=PATIENCE)
    for operation in schema.get_all_operations():
        found = operation.ok()
        modes = [found.as_strategy(generation_mode=mode) for mode in GenerationMode]

        @given(case=strategies.one_of(*modes))
        @settings(max_examples=25)
        def check(case: schemathesis.Case) -> None:
            response = case.call(headers=headers, timeout=PATIENCE)
            case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

        check()
