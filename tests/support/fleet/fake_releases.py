"""The releases of a fake engine: the steps, the share and its failures, as those of a real one.

Beside the journal, `canaries.json` has the digests that have a canary set, and whether they pass it; `broken` has the
digests whose requests fail.
"""

import json
import time
from typing import Any

from support.fleet.fake_admin import FakeAdmin, RefusalError

from peanut_serve.releases.rules import too_many_failed
from peanut_serve.settings.versions import CURRENT, staged_name
from peanut_serve.variants.release import Release

VERBS = ("hold", "stage", "check", "weight", "promote", "rollback")


class FakeReleases:
    """Steps of releases, on the records of an admin side."""

    def __init__(self, admin: FakeAdmin) -> None:
        self.admin = admin

    def all(self) -> list[dict[str, Any]]:
        return [record["release"] for record in self.admin.records.values() if record.get("release")]

    def find(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self.admin.records.get(name, {}).get("release")
        if found is None:
            raise RefusalError(404, f"{name} has no release; stage a version of it")
        return found

    def open_one(self, name: str) -> dict[str, Any]:
        found = self.find(name)
        if found["state"] != "staged":
            raise RefusalError(409, f"the release of {name} was {found['state']}")
        return found

    def make(self, verb: str, name: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Make a step, and return the release. Raises `RefusalError`."""
        if name not in self.admin.records:
            raise RefusalError(404, f"no {name}")
        if verb == "stage" and self.admin.refuses(staged_name(name)):
            raise RefusalError(422, f"{name} cannot be changed here")
        if verb == "hold":
            self.admin.current(name)
            self.admin.records[name]["held"] = True
            self.admin.save()
            return None
        if verb == "stage":
            self._stage(name, body.get("source"), body.get("digest"))
        elif verb == "check":
            self._check(self.open_one(name))
        elif verb == "weight":
            release = self.open_one(name)
            rules = {key: body[key] for key in ("weight", "max_error_rate", "min_requests") if key in body}
            if release["passed"] is False and not body.get("force"):
                raise RefusalError(409, f"{name} has not passed its canary set")
            release |= {**rules, "watched": 0, "failed": 0}
        elif verb == "promote":
            self._promote(name, self.open_one(name))
        else:
            self._roll_back(name, self.find(name), body.get("reason"))
        self.admin.save()
        return self.find(name)

    def _stage(self, name: str, source: str | None, digest: str | None) -> None:
        record = self.admin.records[name]
        if (record.get("release") or {}).get("state") == "staged":
            raise RefusalError(409, f"{name} has a release")
        self.admin.current(name)
        entry = source or record["source"]
        found = self.admin.in_files(entry)
        if found is None:
            raise RefusalError(404, f"the files of {entry} were not found")
        if digest not in (None, found):
            if not self.admin.has_theta(str(digest)):
                raise RefusalError(422, f"the files of {entry} have another version")
            found = str(digest)
        if found == record["digest"]:
            raise RefusalError(422, f"the files of {entry} have the version that {name} has now")
        record["held"] = True
        staged = self.admin.record(entry)
        self.admin.records[staged_name(name)] = staged
        self.admin.move(staged, found, found, held=True)
        rules = {"weight": 0, "max_error_rate": 0.05, "min_requests": 20, "watched": 0, "failed": 0}
        facts = {
            "name": name,
            "digest": found,
            "source": entry,
            "replaces": record["digest"],
            "from": record["source"],
        }
        record["release"] = {**facts, **rules, "state": "staged", "passed": None, "canary": [], "events": []}
        self._note(record["release"], "stage", None)
        self._check(record["release"])

    def _check(self, release: dict[str, Any]) -> None:
        file = self.admin.folder / "canaries.json"
        passes = (json.loads(file.read_text()) if file.exists() else {}).get(release["digest"])
        problems = [] if passes else ["'42' is not in the answer"]
        release["passed"] = passes
        release["canary"] = (
            [{"prompt": "6 times 7?", "answer": "?", "problems": problems}] if passes is not None else []
        )

    def _note(self, release: dict[str, Any], action: str, detail: str | None) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        release["events"].append({"at": at, "action": action, "digest": release["digest"], "detail": detail})

    def _end(self, name: str, release: dict[str, Any], state: str, reason: str | None) -> None:
        release |= {"state": state, "weight": 0, "watched": 0, "failed": 0}
        self._note(release, "promote" if state == "promoted" else "rollback", reason)
        self.admin.records.pop(staged_name(name), None)
        self.admin.save()

    def _promote(self, name: str, release: dict[str, Any]) -> None:
        record = self.admin.records[name]
        self._end(name, release, "promoted", None)
        record["source"] = release["source"]
        self.admin.move(record, release["digest"], release["digest"], held=True)

    def _roll_back(self, name: str, release: dict[str, Any], reason: str | None) -> None:
        record = self.admin.records[name]
        if release["state"] == "promoted" and record["digest"] == release["digest"]:
            record["source"] = release["from"]
            self.admin.move(record, release["replaces"], self.admin.in_files(release["from"]), held=True)
        elif release["state"] != "staged":
            raise RefusalError(409, f"{name} has no version that a release gave it")
        self._end(name, release, "rolled_back", reason)

    # requests

    def answering(self, asked: str, session: str | None) -> str:
        """See `Catalogue.answering`; it draws as a real engine does."""
        name = asked.removesuffix(CURRENT)
        release = self.admin.records.get(name, {}).get("release")
        if release is None or release["state"] != "staged":
            return asked
        drawn = Release(
            digest=release["digest"], source="", replaces="", replaces_source="", weight=release["weight"]
        ).draws(session)
        return staged_name(name) if asked == name and drawn else name

    def fails(self, name: str, digest: str) -> bool:
        """Whether the request that a version answers fails; counted, which may end the release."""
        file = self.admin.folder / "broken"
        is_failure = file.exists() and digest in file.read_text().split()
        main = name.removesuffix("@staged")
        release = self.admin.records.get(main, {}).get("release")
        if name != main and release is not None and release["weight"]:
            release["watched"] += 1
            release["failed"] += is_failure
            rules = {key: release[key] for key in ("digest", "max_error_rate", "min_requests")}
            reason = too_many_failed(
                Release(source="", replaces="", replaces_source="", **rules), release["watched"], release["failed"]
            )
            if reason is not None:
                self._end(main, release, "rolled_back", reason)
        return is_failure
