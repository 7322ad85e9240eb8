"""
What a row of a service's log says of one key: a name for what happened, and its facts.

The names and facts are a contract: `docs/audit.md` lists them, `audit follow --json` prints them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

__all__ = ["ROUTINE", "Happening", "KeyName", "facts_of", "kind_of", "marks_of", "told_of_evidence"]

# What is allowed many times a second, and is counted rather than listed.
ROUTINE: Final = frozenset({"read", "used"})
_KINDS: Final[Mapping[str, str]] = {
    "keys/create": "created",
    "keys/import": "imported",
    "keys/update": "changed",
    "keys/rotate": "rotated",
    "keys/delete": "deleted",
    "keys/recover": "recovered",
    "keys/purge": "purged",
    "keys/backup": "backed_up",
    "keys/restore": "restored",
    "keys/release": "released",
    "keys/nearexpiry": "expires_soon",
    "keyrotationpolicies/write": "rotation_policy",
    "keys/read": "read",
    "keys/versions": "read",
    "deletedkeys/read": "read",
    "keyrotationpolicies/read": "read",
    "keys/encrypt": "used",
    "keys/decrypt": "used",
    "keys/sign": "used",
    "keys/verify": "used",
    "keys/wrapKey": "used",
    "keys/unwrapKey": "used",
    "roleAssignments/write": "role_given",
    "roleAssignments/delete": "role_taken",
    "roleAssignments/read": "read",
    "roleDefinitions/write": "role_defined",
    "roleDefinitions/delete": "role_removed",
    "roleDefinitions/read": "read",
    "audit/prune": "log_cut",
}
_DAMAGED: Final = "the stored row is as it was written"
# Claims that say what was measured, by the name that they are shown with.
_MEASURED: Final[Mapping[str, str]] = {
    "x-ms-sgx-mrenclave": "mrenclave",
    "x-ms-sevsnpvm-launchmeasurement": "launch measurement",
    "tdx_mrtd": "mrtd",
    "x-ms-sevsnpvm-hostdata": "host data",
}
_SIGNERS: Final[Mapping[str, str]] = {
    "x-ms-sgx-mrsigner": "mrsigner",
    "x-ms-sevsnpvm-idkeydigest": "id key",
    "x-ms-sevsnpvm-authorkeydigest": "author key",
}
_MORE: Final[Mapping[str, str]] = {
    "x-ms-sgx-product-id": "product",
    "x-ms-sgx-svn": "svn",
    "x-ms-sevsnpvm-guestsvn": "guest svn",
}
_DEBUG: Final = (
    "x-ms-sgx-is-debuggable",
    "x-ms-sevsnpvm-is-debuggable",
    "tdx_td_attributes_debug",
)
_ORDER: Final = (
    *("kty", "key_ops", "enabled", "exportable", "immutable", "policy", "policy_text"),
    *("changed", "after", "versions", "vault"),
)
_KEY: Final = re.compile(r"([0-9a-zA-Z-]{1,127})(?:/([0-9a-f]{32}))?")
_ADDRESS: Final = re.compile(r"(https?://[^/\s?#]+)/keys/(.*?)/?")


def host_of(address: str) -> str:
    """Return the host of a vault's address, and its port if it is not the usual one."""
    return address.partition("://")[2].lower().removesuffix("/").removesuffix(":443")


@dataclass(frozen=True, slots=True)
class KeyName:
    """
    A key that is followed.

    Attributes:
        name: Its name.
        version: One version of it; "" for all.
        vault: The address of its vault, where a URL was given.

    """

    name: str
    version: str = ""
    vault: str = ""

    @classmethod
    def read(cls, text: str) -> KeyName:
        """
        Read ``NAME``, ``NAME/VERSION``, or a key's URL.

        Raises:
            ValueError: It is none of these.

        """
        address = _ADDRESS.fullmatch(text)
        found = _KEY.fullmatch(address[2] if address else text)
        if found is None:
            raise ValueError(
                f"not a key: {text!r:.120}; a key is NAME, NAME/VERSION or "
                "https://VAULT/keys/NAME[/VERSION]"
            )
        return cls(found[1], found[2] or "", host_of(address[1]) if address else "")

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.version else self.name

    def names(self, resource: str) -> bool:
        """Whether a row of the vault about *resource* is about this key."""
        path, _, _ = resource.partition(" ")  # roles: the scope, a space, the assignment's id
        parts = path.split("/")
        if parts[1:3] != ["keys", self.name]:
            return False
        version = parts[3] if len(parts) > 3 else ""
        return not self.version or not version or version == self.version

    def concerns(self, resource: str, action: str) -> bool:
        """Whether a row of the vault about *resource* is about this key, or about every key."""
        if self.names(resource):
            return True
        if resource.partition(" ")[0] == "/":
            return action.startswith(("role", "vault/")) or action == "audit/prune"
        return False


@dataclass(slots=True)
class Happening:
    """
    One thing that happened to a key.

    Attributes:
        service: Whose log has it: ``vault`` or ``attestation``.
        what: Its name; a refusal has the name of what was refused.
        row: The row, whole, with its number.
        facts: What a reviewer wants of it, in order.
        verified: No finding of the verification names this row.
        signed: A checkpoint covers this row.

    """

    service: Literal["vault", "attestation"]
    what: str
    row: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    verified: bool = True
    signed: bool = True

    @property
    def at(self) -> str:
        """RFC 3339 time."""
        return text_of(self.row, "at")

    @property
    def decision(self) -> str:
        """``allowed``, ``refused`` or ``failed``."""
        return text_of(self.row, "decision")

    @property
    def version(self) -> str:
        """The key's version that the row names."""
        return version_of(text_of(self.row, "resource"))

    def to_json(self) -> dict[str, Any]:
        """Return the form that the command prints."""
        return {
            "service": self.service,
            "seq": self.row["seq"],
            "at": self.at,
            "what": self.what,
            "decision": self.decision,
            "action": text_of(self.row, "action"),
            "caller": text_of(self.row, "caller"),
            "version": self.version if self.service == "vault" else "",
            "reference": text_of(self.row, "reference"),
            "verified": self.verified,
            "signed": self.signed,
            "facts": self.facts,
        }


def text_of(row: Mapping[str, Any], name: str) -> str:
    """Return a member that is text, "" for anything else: a row may be anybody's."""
    found = row.get(name)
    return found if isinstance(found, str) else ""


def table_of(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a member that is a table; an empty one for anything else."""
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def version_of(resource: str) -> str:
    """Return the version that a resource names, "" for none."""
    parts = resource.partition(" ")[0].split("/")
    return parts[3] if len(parts) > 3 and parts[1] == "keys" else ""


def kind_of(action: str, decision: str, condition: str) -> str:
    """Return the name of what a row of the vault tells."""
    if decision == "failed" and condition == _DAMAGED:
        return "damaged"
    if action.startswith("vault/"):
        return "kek"
    return _KINDS.get(action, "other")


def _flat(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return claims by the last part of their names: those of an inner TEE, too."""
    found: dict[str, Any] = {}
    for name, value in claims.items():
        if isinstance(value, dict):
            found.update({str(inner): item for inner, item in value.items()})
        else:
            found[name.removeprefix("x-ms-isolation-tee.")] = value
    return found


def told_of_evidence(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return what claims say of the code: what measured it, by whom it is signed, debug or not."""
    flat = _flat(claims)
    found: dict[str, Any] = {}
    kind = flat.get("x-ms-attestation-type")
    if kind is not None:
        found["kind"] = kind
    for names in (_MEASURED, _SIGNERS, _MORE):
        found.update({shown: flat[name] for name, shown in names.items() if name in flat})
    debug = [flat[name] for name in _DEBUG if name in flat]
    if debug:
        found["debuggable"] = debug[0] if len(debug) == 1 else debug
    return found


def marks_of(claims: Mapping[str, Any]) -> set[str]:
    """Return the measurements and signers that claims name, to find evidence of the same code."""
    flat = _flat(claims)
    return {
        f"{shown} {flat[name]}"
        for names in (_MEASURED, _SIGNERS)
        for name, shown in names.items()
        if isinstance(flat.get(name), str) and flat[name]
    }


def facts_of(what: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a row of the vault."""
    details = table_of(row, "details")
    facts: dict[str, Any] = {}
    if text_of(row, "decision") != "allowed":
        for name in ("condition", "expected", "found"):
            if row.get(name) is not None and row.get(name) != "":
                facts[name] = row[name]
    if what == "released":
        facts |= _of_release(row, details)
    elif what == "used":
        facts |= {"operation": text_of(row, "action").removeprefix("keys/")}
        facts |= {"algorithm": details["alg"]} if "alg" in details else {}
    elif what in ("role_given", "role_taken"):
        path, _, assignment = text_of(row, "resource").partition(" ")
        facts |= {"scope": path, "assignment": assignment}
        facts |= {name: details[name] for name in ("principal", "role") if name in details}
    else:
        names = [*(name for name in _ORDER if name in details), *sorted(set(details) - {*_ORDER})]
        facts |= {name: details[name] for name in names if name != "held"}
    if text_of(row, "rule") and what not in ("released", "created", "imported", "read", "used"):
        rule = text_of(row, "rule")
        if not rule.startswith("Microsoft.KeyVault/vaults/"):
            facts.setdefault("rule", rule)
    return facts


def _of_release(row: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    rule = text_of(row, "rule")
    if rule.startswith("release policy "):
        facts["policy"] = rule.removeprefix("release policy ")
    digest = text_of(row, "evidence_digest")
    if digest:  # else it was refused before its token was read, and token_id is the caller's
        facts |= {"token": text_of(row, "token_id"), "token_digest": digest}
    facts |= {
        shown: details[name]
        for name, shown in (
            ("authority", "authority"),
            ("enc", "algorithm"),
            ("transfer_key", "transfer_key"),
            ("signer", "answer_signer"),
            ("vault", "vault"),
        )
        if name in details
    }
    evidence = told_of_evidence(table_of(row, "claims"))
    if evidence:
        facts["evidence"] = evidence
    return facts
