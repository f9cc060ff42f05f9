"""What tenants have used, as the admin API shows it."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone

from pydantic import Field

from peanut_serve.tenants.usage import USAGE, UsageBook, Used
from peanut_serve.web.schema import Answer


class TenantUsage(Answer):
    """What a tenant has used of a variant."""

    variant: str = Field(description="Name of the variant; `other` for all that are no longer served.")
    tenant: str = Field(description="Name in the keys file; `other` for everybody who is not in it.")
    requests: int = Field(description="Requests that were admitted to the engine.")
    prompt_tokens: int = Field(description="Tokens of prompts.")
    generated_tokens: int = Field(description="Tokens of answers.")
    engine_seconds: float = Field(description="Time from the admission of each request to its end, in all.")


class UsageReport(Answer):
    """What was used since the start of the server."""

    since: datetime = Field(description="When the sums began.")
    usage: list[TenantUsage] = Field(description="The sums, by variant and tenant.")


def usage_report(book: UsageBook = USAGE) -> UsageReport:
    """The sums of a book."""
    sums = [TenantUsage(variant=variant, tenant=tenant, **asdict(used)) for variant, tenant, used in book.sums()]
    return UsageReport(since=datetime.fromtimestamp(book.since, timezone.utc), usage=sums)


def summed(reports: Sequence[UsageReport]) -> UsageReport:
    """The sums of several servers, since the first began. There is at least one."""
    book = UsageBook()
    for one in (one for report in reports for one in report.usage):
        numbers = one.model_dump(exclude={"variant", "tenant"})
        book.add(one.variant, one.tenant, Used(**numbers))
    return usage_report(book).model_copy(update={"since": min(report.since for report in reports)})
