"""Connections outlive those of clients and proxies: none is closed just when a request is sent on it."""

from peanut_serve.settings.environment import ADAPTERS
from peanut_serve.settings.launching import variables_of_environment

VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"


def test_the_server_keeps_connections_longer_than_its_clients() -> None:
    assert float(variables_of_environment({ADAPTERS: "tasks"})[VARIABLE]) > 60  # OpenAI's client 5 seconds, nginx 60


def test_the_operator_decides() -> None:
    assert variables_of_environment({ADAPTERS: "tasks", VARIABLE: "7"})[VARIABLE] == "7"
