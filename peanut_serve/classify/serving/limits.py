"""What one client, and all of them together, may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a `TaskServer`.

    Attributes:
        max_batch: the most rows of one run.
        max_delay: seconds that a row waits for others of its task while nothing else is to be run.
        max_queue: the most inputs that are being prepared, wait, or run; more are refused.
        max_inputs: the most inputs of one request.
        max_pixels: of an image, before it is decoded.
        max_characters: of a text.
        max_seconds: of a sound; the memory of attention grows with its square.
        wait_seconds: until a request has its answer, or is given up.
        memory: bytes of the graphs and adapters that are open.
        threads: of one run; None for all cores.
        preparing: threads that prepare inputs.
    """

    max_batch: int = 8
    max_delay: float = 0.002
    max_queue: int = 256
    max_inputs: int = 64
    max_pixels: int = 40_000_000
    max_characters: int = 200_000
    max_seconds: float = 60.0
    wait_seconds: float = 60.0
    memory: int = 4 << 30
    threads: int | None = None
    preparing: int = 2
