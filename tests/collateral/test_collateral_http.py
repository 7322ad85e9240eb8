"""The HTTP client against servers that are slow, truncated, wrong, large, busy or somebody else."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.collateral.http import Client, Response
from pyenclave.errors import CollateralError


def get(url: str, client: Client | None = None, *, max_size: int = 1000) -> Response:
    subject = client or Client(timeout=5, pause=0.01)
    return asyncio.run(subject.get(url, max_size=max_size))


def test_an_answer_comes_with_its_headers(double: Any, answer: Any) -> None:
    double.answers["/a"] = answer(b"hello", {"X-Chain": "c"})
    found = get(double.url + "/a?x=1")
    assert found.body == b"hello"
    assert found.headers["x-chain"] == "c"
    assert double.asked[0][0] == "/a?x=1"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/a",
        "http://192.0.2.1/a",
        "ftp://127.0.0.1/a",
        "file:///etc/passwd",
        "https://user:password@127.0.0.1/a",
        "https:///a",
        "http://127.0.0.1 /a",
        "http://127.0.0.1/a\r\nX: y",
        "http://127.0.0.1:99999/a",
        "http://127.0.0.1/a#b",
        "",
    ],
)
def test_att_33_only_tls_or_this_machine_is_asked(url: str) -> None:
    with pytest.raises(CollateralError):
        get(url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_att_33_a_redirect_is_not_followed(double: Any, answer: Any, status: int) -> None:
    double.answers["/a"] = answer(status=status, headers={"Location": double.url + "/b"})
    double.answers["/b"] = answer(b"elsewhere")
    with pytest.raises(CollateralError, match="redirect"):
        get(double.url + "/a")
    assert [path for path, _ in double.asked] == ["/a"]


def test_att_33_sizes_are_capped_before_and_while_reading(double: Any, answer: Any) -> None:
    double.answers["/said"] = answer(b"x" * 1001)
    double.answers["/unsaid"] = answer(b"x" * 100_000, length=-1)
    double.answers["/lied"] = answer(b"x", length=1 << 40)
    for path in ("/said", "/unsaid", "/lied"):
        with pytest.raises(CollateralError, match="more than 1000"):
            get(double.url + path)
    double.answers["/fits"] = answer(b"x" * 1000)
    assert len(get(double.url + "/fits").body) == 1000


def test_a_truncated_answer_is_none(double: Any, answer: Any) -> None:
    double.answers["/a"] = answer(b"half", length=8)
    with pytest.raises(CollateralError, match="no collateral"):
        get(double.url + "/a", Client(timeout=5, attempts=2, pause=0.01))
    assert len(double.asked) == 2


@pytest.mark.parametrize("how", ["silent", "drip"])
def test_a_slow_server_costs_the_time_that_was_given(double: Any, answer: Any, how: str) -> None:
    double.answers["/a"] = answer(silent=True) if how == "silent" else answer(b"x" * 500, drip=0.05)
    began = time.monotonic()
    with pytest.raises(CollateralError, match="no whole answer"):
        get(double.url + "/a", Client(timeout=0.5))
    assert time.monotonic() - began < 20


def test_a_busy_server_is_asked_again_as_it_wishes(double: Any, answer: Any) -> None:
    double.answers["/a"] = answer(b"ok", {"Retry-After": "1"}, statuses=[429, 503])
    began = time.monotonic()
    assert get(double.url + "/a", Client(timeout=20, pause=0.01)).body == b"ok"
    assert time.monotonic() - began >= 2
    assert len(double.asked) == 3


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(double: Any, answer: Any) -> None:
    double.answers["/a"] = answer(status=429, headers={"Retry-After": "3600"})
    began = time.monotonic()
    with pytest.raises(CollateralError, match="3600"):
        get(double.url + "/a")
    assert time.monotonic() - began < 20
    assert len(double.asked) == 1


@pytest.mark.parametrize(("status", "meaning"), [(404, "nothing is known"), (461, "unknown")])
def test_a_refusal_is_said_and_not_asked_again(
    double: Any, answer: Any, status: int, meaning: str
) -> None:
    double.answers["/a"] = answer(status=status)
    with pytest.raises(CollateralError, match=meaning):
        get(double.url + "/a")
    assert len(double.asked) == 1


def test_nobody_there_is_an_error_that_says_so() -> None:
    with pytest.raises(CollateralError, match="after 2 attempts"):
        get("http://127.0.0.1:1/a", Client(timeout=5, attempts=2, pause=0.01))


def test_cancelling_ends_the_request(double: Any, answer: Any) -> None:
    double.answers["/a"] = answer(silent=True)

    async def main() -> float:
        task = asyncio.create_task(Client(timeout=30).get(double.url + "/a", max_size=10))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic()

    ended = asyncio.run(main())  # waits for the thread, too
    assert time.monotonic() - ended < 20


def _certificate(name: str, alternative: x509.GeneralName) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


@pytest.mark.parametrize(
    ("name", "known", "reached"),
    [
        ("localhost", True, True),
        ("localhost", False, False),
        ("other.invalid", True, False),
        ("localhost by common name", True, False),
    ],
)
def test_att_33_the_servers_certificate_and_name_are_checked(
    double: Any, answer: Any, tmp_path: Path, name: str, known: bool, reached: bool
) -> None:
    mail, host = x509.RFC822Name("somebody@example.com"), x509.DNSName(name.partition(" ")[0])
    only_common_name = name.endswith("by common name")
    certificate, private = _certificate(host.value, mail if only_common_name else host)
    for file, data in (("c.pem", certificate), ("k.pem", private)):
        (tmp_path / file).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    double.server.socket = context.wrap_socket(double.server.socket, server_side=True)
    double.answers["/a"] = answer(b"ok")
    url = double.url.replace("http://127.0.0.1", "https://localhost") + "/a"
    client = Client(timeout=5, ca_file=str(tmp_path / "c.pem") if known else None)
    if reached:
        assert get(url, client).body == b"ok"
        return
    with pytest.raises(CollateralError, match="certificate is refused"):
        get(url, client)
    assert not double.asked


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for wrong in ({"timeout": 0}, {"attempts": 0}, {"pause": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Client(**wrong)  # type: ignore[arg-type]
    with pytest.raises(CollateralError, match="authorities"):
        Client(ca_file=str(tmp_path / "none.pem")).context()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0", "1e308"])
@pytest.mark.parametrize("name", ["timeout", "pause"])
def test_times_that_are_none_are_refused(name: str, value: str) -> None:
    """A guard that cannot be set would not end what takes too long."""
    if (name, value) != ("pause", "0"):
        with pytest.raises(ValueError, match=name):
            Client(**{name: float(value)})
