"""What a service is told at its start: a strict TOML file, or the settings of development."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pyenclave._files import read_file
from pyenclave.errors import ConfigurationError
from pyenclave.services.identity.trust import Challenge, TrustedIssuer, check_tenants, entra
from pyenclave.services.web.limits import Limits, expected
from pyenclave.services.web.tls import DevCa, ServerTls

__all__ = ["Authority", "ServiceConfig", "check_root", "load"]

_MAX_FILE: Final = 1 << 20
_TABLES: Final = frozenset({"service", "tls", "issuers", "authorities", "challenge", "limits"})
_ENTRA_KEYS: Final = frozenset({"entra_tenant", "clients", "authority"})
_ISSUER_KEYS: Final = frozenset(
    {
        *("issuer", "discovery", "jwks", "hosts", "ca", "algorithms", "tenants"),
        *("clients", "kinds", "subject", "require_nbf"),
    }
)
_KEYS: Final = {
    "service": frozenset(
        {
            *("url", "host", "port", "state_dir", "database", "audiences", "administrators"),
            *("backend", "allow_sha1", "release_tokens_once", "retention_days"),
            *("purge_protection", "collateral", "platform_roots", "policy_signers"),
            *("signing_algorithm", "attest_identity", "require_signed_use"),
            *("open_drafts", "dangerous_allow_software", "ear_form"),
        }
    ),
    "tls": frozenset({"certificate", "key", "ca"}),
    "issuers": _ISSUER_KEYS,
    "authorities": frozenset({"url", "ca", "jwks"}),
    "challenge": frozenset({"authorization", "resource"}),
    "limits": frozenset(item.name for item in dataclasses.fields(Limits)),
}
_GUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PLACEHOLDERS: Final = frozenset({"TENANT", "OBJECT_ID"})
AUDIENCE: Final = "https://vault.azure.net"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """
    An attestation service whose tokens a vault believes.

    Attributes:
        url: Its address, and the issuer of its tokens.
        ca_pem: The authority of its TLS certificate, PEM; None: the system's.
        jwks_file: File with its keys: then nothing is fetched.

    """

    url: str
    ca_pem: bytes | None = None
    jwks_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """
    Settings of one service.

    Attributes:
        state_dir: State directory: keys of the service, its enclave, development's authority.
        database: SQLAlchemy URL.
        dev: Development: own authority, loopback only, a development issuer.
        url: Base address as clients write it, without a slash at its end.
        host: Address to listen on.
        port: Port; 0: a free one (development only).
        tls: Certificate and key.
        issuers: Whose tokens of callers are believed.
        audiences: What their ``aud`` must be.
        challenge: What the one without a token is told.
        administrators: ``TENANT/OBJECT_ID`` of those who may do everything from the start.
        platform_roots: Root certificates of further pyenclave platforms, PEM.
        authorities: Attestation services that release policies may name.
        backend: Where keys live: ``enclave``, which decides releases inside, or ``pkcs11:…``: then
            the vault's process decides them.
        collateral: Folder or bundle of endorsements; ``pccs:https://…`` or ``intel``: where they
            are fetched; None: none.
        signing_algorithm: What an attestation service signs with: RS256, ES256 or PS256.
        policy_signers: Certificates (PEM) that policies of an isolated attestation service must be
            signed with; none: it is not isolated.
        ear_form: How an attestation service writes EARs: ``dotted``, as deployed verifiers do, or
            ``underscored``, as the draft has it.
        require_signed_use: An isolated attestation service takes only uploads whose signed header
            says what they are for.
        attest_identity: Whether attesting needs an authenticated caller.
        open_drafts: Anybody may try a policy in an attestation request; development always allows
            it. Otherwise that needs a role that reads policies.
        dangerous_allow_software: An attestation service's default policy also permits enclaves of
            platforms without hardware below; development always does.
        allow_sha1: Also wrap released keys with OAEP over SHA-1, and allow RSA-OAEP and RSA1_5.
        release_tokens_once: An attestation token releases a key once, not as long as it holds.
        retention_days: Days that a vault keeps deleted keys, 7 to 90.
        purge_protection: Nobody can end a deleted key before that.
        dangerous_evidence_time: An attestation service judges evidence as of this time, and its
            tokens say so; in development only, and never from a file.
        ca: Development's authority; None in production.
        limits: Sizes, times, rates.

    """

    state_dir: str
    database: str
    dev: bool = False
    url: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    tls: ServerTls | None = None
    issuers: tuple[TrustedIssuer, ...] = ()
    audiences: tuple[str, ...] = (AUDIENCE,)
    challenge: Challenge | None = None
    administrators: tuple[str, ...] = ()
    platform_roots: tuple[bytes, ...] = ()
    authorities: tuple[Authority, ...] = ()
    backend: str = "enclave"
    collateral: str | None = None
    signing_algorithm: str = "RS256"
    policy_signers: tuple[bytes, ...] = ()
    require_signed_use: bool = False
    ear_form: str = "dotted"
    attest_identity: bool = False
    open_drafts: bool = False
    dangerous_allow_software: bool = False
    allow_sha1: bool = False
    release_tokens_once: bool = False
    retention_days: int = 90
    purge_protection: bool = False
    dangerous_evidence_time: datetime | None = None
    ca: DevCa | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)

    def replace(self, **changes: Any) -> ServiceConfig:
        """Return a copy with other values."""
        return dataclasses.replace(self, **changes)


def _wrong(where: str, expected: str, found: object) -> ConfigurationError:
    try:
        shown = repr(found)[:80]
    except (ValueError, RecursionError):  # a number of thousands of digits
        shown = f"{type(found).__name__} too large to be shown"
    return ConfigurationError(f"configuration: {where}", expected=expected, found=shown)


class _Table:
    """One table of the file: each value is taken once, and what is left over is refused."""

    def __init__(self, name: str, values: object) -> None:
        if not isinstance(values, dict):
            raise _wrong(f"[{name}]", "a table", values)
        self.name = name
        self._left = dict(values)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if value is default:
            return value
        if type(value) is int and kind in (int, float) and abs(value) >= 1 << 63:
            raise _wrong(f"[{self.name}] {key}", "a number of at most 64 bits", value)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise _wrong(f"[{self.name}] {key}", kind.__name__, value)
        return value

    def need(self, key: str, kind: type, why: str) -> Any:
        value = self.take(key, kind)
        if value is None or value == "":
            raise ConfigurationError(f"configuration: [{self.name}] {key} is missing", advice=why)
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        value = self.take(key, list)
        if value is None:
            return None
        if not value or not all(isinstance(item, str) and item for item in value):
            raise _wrong(f"[{self.name}] {key}", "a list of text", value)
        return tuple(value)

    def end(self) -> None:
        if self._left:
            raise ConfigurationError(
                f"configuration: [{self.name}] has an unknown key {min(self._left)!r}"
            )


def _issuer(
    values: object, place: int, relative: Callable[[str], str]
) -> tuple[TrustedIssuer, ...]:
    table = _Table(f"issuers.{place}", values)
    clients = table.strings("clients")
    tenant = table.take("entra_tenant", str)
    if tenant is not None:
        if not _is_guid(tenant):
            raise _wrong(f"[{table.name}] entra_tenant", "the tenant's GUID", tenant)
        authority = table.take("authority", str, "https://login.microsoftonline.com")
        table.end()
        return entra(
            tenant, authority=authority, clients=None if clients is None else frozenset(clients)
        )
    tenants, hosts = table.strings("tenants"), table.strings("hosts")
    algorithms, kinds = table.strings("algorithms"), table.strings("kinds")
    jwks, ca_file = table.take("jwks", str), table.take("ca", str)
    issuer = TrustedIssuer(
        issuer=table.need("issuer", str, "Name the issuer as its tokens do."),
        discovery=table.take("discovery", str),
        jwks=None if jwks is None else _bytes(relative(jwks)),
        hosts=frozenset(hosts or ()),
        ca_file=None if ca_file is None else relative(ca_file),
        algorithms=frozenset(algorithms or ("RS256",)),
        tenants=None if tenants is None else frozenset(tenants),
        clients=None if clients is None else frozenset(clients),
        subject=table.take("subject", str, "oid"),
        kinds=frozenset(kinds or ("app", "user")),
        require_nbf=table.take("require_nbf", bool, True),
    )
    table.end()
    return (issuer,)


def _bytes(path: str) -> bytes:
    return read_file(path, limit=_MAX_FILE)


def _lists(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name, [])
    if not isinstance(value, list):
        raise _wrong(f"[[{name}]]", "a list of tables", value)
    return value


def load(path: str | os.PathLike[str]) -> ServiceConfig:
    """
    Read the configuration of a production service.

    Paths in it are relative to its folder. What production cannot do without is asked for by name.

    Raises:
        ConfigurationError: Unknown or missing keys, wrong values.
        OSError: It, or a file that it names, cannot be read.

    """
    folder = Path(path).resolve().parent

    def relative(name: str) -> str:
        return str(folder / name)

    try:
        document = tomllib.loads(_bytes(os.fspath(path)).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers too long, and brackets too deep, too
        raise ConfigurationError(f"configuration: {path} is not TOML", found=str(error)) from None
    _check_names(document)
    try:
        return _read(document, relative)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"configuration: {error}") from None


def _read(document: Mapping[str, Any], relative: Callable[[str], str]) -> ServiceConfig:
    service = _Table("service", document.get("service", {}))
    tls = _Table("tls", document.get("tls", {}))
    certificate = tls.need("certificate", str, "Production speaks TLS: name the PEM files.")
    key = tls.need("key", str, "Production speaks TLS: name the PEM files.")
    ca = tls.take("ca", str)
    tls.end()
    shown = ServerTls.from_files(
        relative(certificate), relative(key), None if ca is None else relative(ca)
    )
    shown.context()  # refused now, not at the first connection
    issuers = [
        issuer
        for place, item in enumerate(_lists(document, "issuers"))
        for issuer in _issuer(item, place, relative)
    ]
    check_tenants(issuers)
    authorities = []
    for place, item in enumerate(_lists(document, "authorities")):
        table = _Table(f"authorities.{place}", item)
        authority_ca, jwks = table.take("ca", str), table.take("jwks", str)
        authorities.append(
            Authority(
                url=table.need("url", str, "Name the attestation service."),
                ca_pem=None if authority_ca is None else _bytes(relative(authority_ca)),
                jwks_file=None if jwks is None else relative(jwks),
            )
        )
        table.end()
    challenge = None
    if "challenge" in document:
        table = _Table("challenge", document["challenge"])
        authorization = table.need("authorization", str, "Where clients get tokens.")
        resource = table.need("resource", str, "What clients ask tokens for.")
        try:
            challenge = Challenge(authorization, resource)
        except ValueError as error:
            raise ConfigurationError(f"configuration: [challenge] {error}") from None
        table.end()
    url = service.need("url", str, "The address as clients write it, https://…")
    if urlsplit(url).scheme != "https" or url.endswith("/"):
        raise _wrong("[service] url", "https://HOST without a slash at the end", url)
    roots = service.strings("platform_roots") or ()
    collateral = service.take("collateral", str)
    if collateral is not None and collateral != "intel" and not collateral.startswith("pccs:"):
        collateral = relative(collateral)
    signers = service.strings("policy_signers") or ()
    config = ServiceConfig(
        state_dir=relative(service.need("state_dir", str, "Where the service keeps its keys.")),
        database=service.need("database", str, "sqlite:///PATH or postgresql+psycopg://…"),
        url=url,
        host=service.take("host", str, "127.0.0.1"),
        port=service.take("port", int, 8443),
        tls=shown,
        issuers=tuple(issuers),
        audiences=service.strings("audiences") or (AUDIENCE,),
        challenge=challenge,
        administrators=service.strings("administrators") or (),
        platform_roots=tuple(
            check_root(_bytes(relative(root)), f"configuration: platform_roots: {root}")
            for root in roots
        ),
        authorities=tuple(authorities),
        backend=service.take("backend", str, "enclave"),
        collateral=collateral,
        signing_algorithm=service.take("signing_algorithm", str, "RS256"),
        policy_signers=tuple(_bytes(relative(signer)) for signer in signers),
        require_signed_use=service.take("require_signed_use", bool, False),
        ear_form=service.take("ear_form", str, "dotted"),
        attest_identity=service.take("attest_identity", bool, False),
        open_drafts=service.take("open_drafts", bool, False),
        dangerous_allow_software=service.take("dangerous_allow_software", bool, False),
        allow_sha1=service.take("allow_sha1", bool, False),
        release_tokens_once=service.take("release_tokens_once", bool, False),
        retention_days=service.take("retention_days", int, 90),
        purge_protection=service.take("purge_protection", bool, False),
        limits=_limits(document.get("limits", {})),
    )
    service.end()
    if not config.issuers:
        raise ConfigurationError(
            "configuration: no issuer",
            advice="Without [[issuers]] nobody could be let in. Name at least one.",
        )
    entra_only = all("entra_tenant" in item for item in _lists(document, "issuers"))
    _check_people(config, challenge, entra_only=entra_only)
    for key, found, low, high in (
        ("port", config.port, 1, 65_535),
        ("retention_days", config.retention_days, 7, 90),
    ):
        if not low <= found <= high:
            raise _wrong(f"[service] {key}", f"a number from {low} to {high:,}", found)
    return config


def _is_guid(text: str) -> bool:
    return _GUID.fullmatch(text) is not None


def _check_names(document: Mapping[str, Any]) -> None:
    """Refuse unknown tables and keys before any value: a misspelt key is missing, too."""
    unknown = set(document) - _TABLES
    if unknown:
        raise ConfigurationError(f"configuration: unknown table [{min(unknown)}]")
    for name, values in document.items():
        listed = isinstance(values, list)
        for place, table in enumerate(values if listed else [values]):
            if not isinstance(table, dict):
                continue  # refused where it is read
            known = _KEYS[name]
            if name == "issuers":
                known = _ENTRA_KEYS if "entra_tenant" in table else _ISSUER_KEYS
            if left := set(table) - known:
                where = f"{name}.{place}" if listed else name
                raise ConfigurationError(
                    f"configuration: [{where}] has an unknown key {min(left)!r}"
                )


def _check_people(config: ServiceConfig, challenge: Challenge | None, *, entra_only: bool) -> None:
    """Refuse the placeholders of our own pages, and what Entra ID never names anybody."""
    for text in config.administrators:
        tenant, _, person = text.rpartition("/")
        guids = _is_guid(tenant) and _is_guid(person)
        if (
            not tenant
            or not person
            or not (guids or not entra_only)
            or ({tenant, person} & _PLACEHOLDERS)
        ):
            expected = "TENANT/OBJECT_ID, both GUIDs" if entra_only else "TENANT/OBJECT_ID"
            raise _wrong("[service] administrators", expected, text)
    if challenge is not None and _PLACEHOLDERS & set(challenge.authorization.split("/")):
        raise _wrong(
            "[challenge] authorization", "an address with the tenant", challenge.authorization
        )


def check_root(data: bytes, name: str) -> bytes:
    """
    Return *data* if it is a certificate, PEM or DER.

    Raises:
        ConfigurationError: It is not; the message has *name*.

    """
    from pyenclave.attestation.appraise import pinned

    try:
        pinned([data])
    except ValueError as error:
        raise ConfigurationError(
            f"{name} is no root", expected="a certificate, PEM or DER", found=str(error)
        ) from None
    return data


def _limits(values: object) -> Limits:
    table = _Table("limits", values)
    chosen: dict[str, Any] = {}
    for item in dataclasses.fields(Limits):
        whole = item.name in (
            *("path", "header", "body", "json_depth", "concurrent", "connections"),
            *("burst", "refusals_burst", "unfinished", "unfinished_bytes"),
        )
        value = table.take(item.name, int if whole else float)
        if value is None:
            continue
        try:
            Limits(**{item.name: value})
        except ValueError:
            raise _wrong(f"[limits] {item.name}", expected(item.name), value) from None
        chosen[item.name] = value
    table.end()
    return Limits(**chosen)
