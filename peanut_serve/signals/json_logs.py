"""Log lines as JSON, one object a line: of this package, of vLLM and its processes, and of uvicorn.

vLLM and uvicorn are given a configuration of Python's logging. vLLM's other processes read it from a file.
"""

import io
import json
import logging
import logging.config
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LOGGING_PATH = "VLLM_LOGGING_CONFIG_PATH"  # where vLLM's processes find the configuration

_FILE = "logging.json"
_OURS = ("vllm.peanut_serve", "peanut_serve")
# attributes of every record, and those that only make sense in text
_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message", "fileinfo", "vllm_process_name"}
_ACCESS = ("client", "method", "path", "http_version", "status")  # what uvicorn's access log has as arguments
_PLACEHOLDER = re.compile(r"(?:\b(?P<name>[a-z_]+)=)?%(?:%|[-+ #0]*\d*(?:\.\d+)?(?P<kind>[sdfgreix]))")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line: time in UTC, level, logger, process, message, what else is known, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": getattr(record, "vllm_process_name", None) or record.processName,
            "pid": record.process,
            "message": record.getMessage(),
        }
        for name, value in _facts(record):
            entry.setdefault(name, value if isinstance(value, str | int | float | bool | None) else str(value))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry)


def _facts(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What was given as `extra`; the arguments that a message of this package names, as `variant=%s`."""
    yield from ((name, value) for name, value in vars(record).items() if name not in _USUAL)
    arguments = record.args if isinstance(record.args, tuple) else ()
    if record.name == "uvicorn.access" and len(arguments) == len(_ACCESS):
        yield from zip(_ACCESS, arguments, strict=True)
    elif record.name.startswith(_OURS):
        found = [one["name"] for one in _PLACEHOLDER.finditer(str(record.msg)) if one["kind"]]
        yield from ((name, value) for name, value in zip(found, arguments, strict=False) if name is not None)


def handler(stream: io.TextIOBase) -> logging.Handler:
    """The handler of the configuration; from then on, Python's warnings are log lines as well."""
    logging.captureWarnings(True)
    return logging.StreamHandler(stream)


def json_logging(level: str = "INFO", stream: str = "ext://sys.stdout") -> dict[str, Any]:
    """A configuration for `logging.config.dictConfig`, which uvicorn and vLLM take as well.

    Args:
        level: of this package, and of vLLM.
        stream: that gets the lines.
    """
    own = {"handlers": ["json"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.JsonFormatter"}},
        "handlers": {"json": {"()": f"{__name__}.handler", "formatter": "json", "stream": stream}},
        "root": {"handlers": ["json"], "level": "WARNING"},
        "loggers": {
            "vllm": {**own, "level": level},
            "peanut_serve": {**own, "level": level},
            "uvicorn": {**own, "level": "INFO"},
            "uvicorn.error": {"level": "INFO"},
            "uvicorn.access": {"level": "INFO"},
        },
    }


def use_json_logs(configuration: Mapping[str, Any]) -> None:
    """Log as JSON in this process from now on, an exception that ends it included."""
    logging.config.dictConfig(dict(configuration))
    sys.excepthook = _log_exception


def uvicorn_logging() -> dict[str, Any]:
    """Arguments of `uvicorn.Config` that leave its loggers as they are, if they log as JSON."""
    handlers = logging.getLogger("uvicorn").handlers
    return {"log_config": None} if any(isinstance(one.formatter, JsonFormatter) for one in handlers) else {}


def write_configuration(configuration: Mapping[str, Any], folder: Path) -> Path:
    """Write a configuration to a folder, for vLLM's processes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _FILE
    file.write_text(json.dumps(configuration, indent=2))
    return file


class LogLines(io.StringIO):
    """A text file whose texts become log lines: for what a command prints for people before it serves."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger

    def write(self, text: str, /) -> int:
        """Log a text."""
        if line := " ".join(text.split()):
            self._logger.warning("%s", line)
        return len(text)


def _log_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("peanut_serve").critical("%s", error, exc_info=(kind, error, traceback))
