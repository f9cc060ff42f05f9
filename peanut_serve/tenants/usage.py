"""What tenants have used of which variants since the start of the server, for chargeback, and what they were refused.

The labels are names of variants and of the keys file. What belongs to a name that is gone is added to `other`, so
that the series of a name end with it, and no sum becomes smaller.
"""

import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from prometheus_client import REGISTRY, Counter
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from peanut_serve.tenants.keys import OTHERS

REFUSED = Counter("peanut_refused_requests", "Requests that a tenant was refused, by reason.", ["tenant", "reason"])
REFUSED.labels(OTHERS, "key")  # so that the first one can be seen as an increase


@dataclass
class Used:
    """What one tenant has used of one variant.

    Attributes:
        requests: those that were admitted to the engine.
        prompt_tokens: of their prompts.
        generated_tokens: of their answers.
        engine_seconds: from the admission of each to the end of its answer.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    engine_seconds: float = 0.0

    def add(self, other: "Used") -> None:
        """Add what was used besides."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.engine_seconds += other.engine_seconds


_FAMILIES = (
    ("peanut_usage_requests", "Requests that were admitted to the engine, by variant and tenant."),
    ("peanut_usage_prompt_tokens", "Tokens of prompts, by variant and tenant."),
    ("peanut_usage_generated_tokens", "Tokens of answers, by variant and tenant."),
    ("peanut_usage_engine_seconds", "Time from the admission of requests to their ends, by variant and tenant."),
)


class UsageBook(Collector):
    """Sums by variant and tenant, as metrics. For one event loop; the registry reads it in other threads.

    Attributes:
        since: when it began, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self._used: dict[tuple[str, str], Used] = {}

    def add(self, variant: str, tenant: str, used: Used) -> None:
        """Add to the sums."""
        self._used.setdefault((variant, tenant), Used()).add(used)

    def sums(self) -> list[tuple[str, str, Used]]:
        """(variant, tenant, what was used), in alphabetical order."""
        return [(*names, Used(*astuple(used))) for names, used in sorted(self._used.items(), key=lambda one: one[0])]

    def forget_variant(self, variant: str) -> None:
        """Add the sums of a variant that is no longer served to those of others."""
        for name, tenant in [names for names in self._used if names[0] == variant != OTHERS]:
            self.add(OTHERS, tenant, self._used.pop((name, tenant)))

    def forget_tenant(self, tenant: str) -> None:
        """Add the sums of a tenant that is no longer in the keys file to those of others."""
        for variant, name in [names for names in self._used if names[1] == tenant != OTHERS]:
            self.add(variant, OTHERS, self._used.pop((variant, name)))

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The current samples."""
        now = [(names, astuple(used)) for names, used in list(self._used.items())]
        for index, (name, text) in enumerate(_FAMILIES):
            family = CounterMetricFamily(name, text, labels=["variant", "tenant"])
            for names, values in now:
                family.add_metric(names, values[index])
            yield family


USAGE = UsageBook()
REGISTRY.register(USAGE)


def count_tokens(variant: str, tenant: str, prompt: int, generated: int) -> None:
    """Count tokens that the engine has read and generated for a request."""
    USAGE.add(variant, tenant, Used(prompt_tokens=prompt, generated_tokens=generated))


def forget_refusals(tenant: str) -> None:
    """Remove the series of a tenant that is no longer in the keys file."""
    samples = [sample for family in REFUSED.collect() for sample in family.samples]
    for reason in {sample.labels["reason"] for sample in samples if sample.labels["tenant"] == tenant}:
        REFUSED.remove(tenant, reason)
