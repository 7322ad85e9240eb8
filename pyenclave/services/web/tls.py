"""
TLS of services, and the certificate authority of development.

One authority serves all development services of a state directory (``dev/`` in it, its key in a
file of mode 0600 that is made once and never replaced), so that they trust each other without
configuration. Certificates have AKI, SKI and SAN: strict verifiers ask for them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import ssl
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, overload

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pyenclave._files import read_file
from pyenclave.errors import PlatformUnavailableError

__all__ = ["LOCAL_NAMES", "DevCa", "ServerTls", "private_file"]

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_SKEW: Final = timedelta(hours=1)
_CA_DAYS: Final = 3650
_LEAF_DAYS: Final = 90
_MAX_FILE: Final = 64 << 10
_MAX_PEM: Final = 1 << 20

LeafKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """
    What a server shows.

    Attributes:
        chain: Its certificate and the intermediate ones, PEM.
        key: Its private key, PEM.
        ca: The authority that clients trust, PEM, if it is not one of the system's.

    """

    chain: bytes
    key: bytes = field(repr=False)
    ca: bytes | None = None

    @classmethod
    def from_files(cls, certificate: str, key: str, ca: str | None = None) -> ServerTls:
        """Read PEM files."""
        authority = None if ca is None else read_file(ca, limit=_MAX_PEM)
        return cls(
            chain=read_file(certificate, limit=_MAX_PEM),
            key=read_file(key, limit=_MAX_PEM),
            ca=authority,
        )

    def context(self) -> ssl.SSLContext:
        """
        Return the settings: TLS 1.2 or later, no compression, no renegotiation.

        Raises:
            ValueError: Certificate and key are not usable, or do not belong together.

        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            with _as_file(self.chain + b"\n" + self.key) as path:
                # A key with a passphrase is refused, not asked for at a terminal.
                context.load_cert_chain(path, password=lambda: b"")
        except ssl.SSLError as error:
            raise ValueError(
                f"the TLS certificate and key are not usable: {error.reason or error}"
            ) from None
        return context


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """OpenSSL reads keys from files only: one in memory where there is such a thing."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tls", os.MFD_CLOEXEC)
        try:
            os.write(fd, data)
            yield f"/proc/self/fd/{fd}"
        finally:
            os.ftruncate(fd, 0)
            os.close(fd)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tls.pem")
        private_file(path, data)
        yield path


def private_file(path: str | os.PathLike[str], data: bytes) -> bytes:
    """
    Make a file of mode 0600 once, and return what it holds.

    Whoever comes second gets what the first wrote, whole.

    Raises:
        PlatformUnavailableError: There is one that others may read, or that is no plain file.
        OSError: It cannot be made.

    """
    target = os.fspath(path)
    if not os.path.lexists(target):
        aside = f"{target}.{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(aside, target)
        finally:
            os.unlink(aside)
    fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PlatformUnavailableError(f"{target} is not a file of this user")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise PlatformUnavailableError(
                f"{target} is open to others",
                expected="mode 0600",
                found=oct(stat.S_IMODE(status.st_mode)),
            )
        return file.read(_MAX_FILE)


def _pem(key: LeafKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class DevCa:
    """
    The certificate authority of the development services of one state directory.

    Args:
        state_dir: The state directory; None: an authority that lives in memory only.

    Attributes:
        pem: The authority's certificate.
        path: The file that has it; None in memory.

    """

    def __init__(self, state_dir: str | os.PathLike[str] | None) -> None:
        self.path: str | None = None
        if state_dir is None:
            self._key, self._certificate = _authority(ec.generate_private_key(ec.SECP256R1()))
        else:
            folder = os.path.join(os.path.abspath(state_dir), "dev")
            os.makedirs(folder, mode=0o700, exist_ok=True)
            # One file has both, so that nobody ever meets a key without its certificate.
            made = ec.generate_private_key(ec.SECP256R1())
            _, fresh = _authority(made)
            held = private_file(
                os.path.join(folder, "ca-key.pem"),
                _pem(made) + fresh.public_bytes(serialization.Encoding.PEM),
            )
            try:
                key = serialization.load_pem_private_key(held, None)
                self._certificate = x509.load_pem_x509_certificate(held)
            except (ValueError, TypeError) as error:
                raise PlatformUnavailableError(
                    f"{folder}/ca-key.pem is damaged",
                    found=str(error),
                    advice="Remove the folder: development services make a new authority.",
                ) from None
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise PlatformUnavailableError(f"{folder}/ca-key.pem has a key of another kind")
            self._key = key
            self.path = os.path.join(folder, "ca.pem")
            _public_file(self.path, self._certificate.public_bytes(serialization.Encoding.PEM))
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    @overload
    def leaf(
        self, names: Sequence[str] = ..., *, key: Literal["ec"] = ...
    ) -> tuple[ec.EllipticCurvePrivateKey, list[bytes]]: ...

    @overload
    def leaf(
        self, names: Sequence[str] = ..., *, key: Literal["rsa"]
    ) -> tuple[rsa.RSAPrivateKey, list[bytes]]: ...

    def leaf(
        self, names: Sequence[str] = LOCAL_NAMES, *, key: Literal["ec", "rsa"] = "ec"
    ) -> tuple[LeafKey, list[bytes]]:
        """
        Make a key and its certificate.

        Args:
            names: DNS names and addresses.
            key: ``ec`` (P-256) or ``rsa`` (2,048 bits).

        Returns:
            The key, and the chain in DER, leaf first, the authority last.

        """
        made: LeafKey = (
            ec.generate_private_key(ec.SECP256R1())
            if key == "ec"
            else rsa.generate_private_key(65537, 2048)
        )
        now = datetime.now(UTC)
        public = made.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(names[0]))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + timedelta(days=_LEAF_DAYS))
            .add_extension(x509.SubjectAlternativeName([_san(n) for n in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        der = serialization.Encoding.DER
        return made, [certificate.public_bytes(der), self._certificate.public_bytes(der)]

    def server(self, names: Sequence[str] = LOCAL_NAMES) -> ServerTls:
        """Return what a server of these names shows; its key lives in memory only."""
        key, chain = self.leaf(names)
        leaf = x509.load_der_x509_certificate(chain[0])
        pem = leaf.public_bytes(serialization.Encoding.PEM)
        return ServerTls(chain=pem, key=_pem(key), ca=self.pem)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(
    key: ec.EllipticCurvePrivateKey,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    now = datetime.now(UTC)
    name = _name(f"pyenclave development {secrets.token_hex(4)}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _public_file(path: str, data: bytes) -> None:
    """Write a public file as a whole, if it is not there as it should be."""
    with contextlib.suppress(FileNotFoundError):
        if read_file(path, limit=_MAX_PEM) == data:
            return
    aside = f"{path}.{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    os.replace(aside, path)
