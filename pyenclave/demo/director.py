"""
The director of the demo: starts owner, host and attackers, and tells what happened.

Owner, host and enclave are three processes; each attacker is a program of its own. The director
holds none of the owner's secrets except the patterns that its scanner looks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.serialization import Encoding

import pyenclave
from pyenclave import image as images
from pyenclave._native import drop_capabilities
from pyenclave.demo import _starting, data
from pyenclave.demo.attacks import memory, tamper
from pyenclave.demo.wire import Peer
from pyenclave.errors import EnclaveError
from pyenclave.image import build, sign

__all__ = ["run"]

Say = Callable[[str], None]


class _Company:
    """The child processes of the demo; they end with the block."""

    def __init__(self) -> None:
        self.programs: list[_Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None and not issubclass(exc_type, Exception):
            # Ctrl-C, SIGTERM: all at once, or each would tell that the others went.
            for program in self.programs:
                program.process.kill()
        for program in reversed(self.programs):
            program.end()


class _Program:
    """
    A child process of the demo.

    Args:
        company: Ends the process.
        arguments: What ``python -m`` runs.
        line: The socket that becomes its standard input; default: a line to the director.
        extra: A further descriptor that it inherits under the same number.
    """

    def __init__(
        self,
        company: _Company,
        *arguments: str,
        line: socket.socket | None = None,
        extra: socket.socket | None = None,
    ) -> None:
        ours, theirs = socket.socketpair() if line is None else (None, line)
        with _starting.undisturbed():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *arguments],
                stdin=theirs.fileno(),
                # One thread on both sides: the figures are then equal bit for bit.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                pass_fds=() if extra is None else (extra.fileno(),),
                process_group=0,  # a terminal's Ctrl-C is the director's
            )
            self._peer = None if ours is None else Peer(ours)
            company.programs.append(self)
        theirs.close()

    @property
    def peer(self) -> Peer:
        """The director's line to the process."""
        if self._peer is None:
            raise EnclaveError("this process of the demo has no line to the director")
        return self._peer

    def end(self) -> None:
        """End the process, politely first."""
        if self._peer is not None:
            self._peer.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
            return
        self.process.kill()
        self.process.wait()


def _attack(name: str, order: dict[str, Any]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pyenclave.demo.attacks", name],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        process_group=0,
    )
    if done.returncode != 0:
        raise EnclaveError(f"the attack {name} did not run: {done.stderr.strip()[-2000:]}")
    outcome: dict[str, str] = json.loads(done.stdout)
    return outcome


def _scan(pids: list[int], paths: list[str], patterns: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pyenclave.demo.scan"],
        input=json.dumps({"pids": pids, "paths": paths, "patterns": patterns}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        process_group=0,
    )
    if done.returncode != 0:
        raise EnclaveError(f"the scanner did not run: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _prepare(folder: Path) -> dict[str, str]:
    """Build and sign the demo's image, the owner's way; return the orders' common part."""
    manifest = folder / "enclave.toml"
    manifest.write_text(
        '[enclave]\nname = "scoring"\nentry = "scoring.py"\nproduct_id = 7\n'
        'security_version = 1\n\n[memory]\nmessage = "64 MiB"\nsealed = "32 MiB"\n'
    )
    source = resources.files("pyenclave.demo").joinpath("scoring.py").read_text("utf-8")
    (folder / "scoring.py").write_text(source)
    key, other = images.keygen(), images.keygen()
    unsigned = build.build(manifest)
    signed = folder / "scoring.enclave"
    signed.write_bytes(sign.sign(unsigned, key))
    manifest.write_text(manifest.read_text().replace("[memory]", "debug = true\n\n[memory]", 1))
    debuggable = folder / "debuggable.enclave"
    debuggable.write_bytes(sign.sign(build.build(manifest), key))
    return {
        "image": str(signed),
        "debuggable_image": str(debuggable),
        "other_key": other.decode(),
        "folder": str(folder),
    }


def run(*, rows: int = 0, say: Say, progress: Say) -> dict[str, Any]:
    """
    Run the whole demo and return its summary (design §10, ``demo --json``).

    Args:
        rows: Applicants to score; 0: those of the table that the model was not trained on.
        say: Called with each line for people.
        progress: Called with what is being done now.
    """
    started = time.monotonic()
    data.check()
    if os.geteuid() == 0:
        drop_capabilities()
        say("started as root: every process keeps uid 0 and has dropped all capabilities")
    with ExitStack() as stack:
        folder = stack.enter_context(_starting.folder())
        # State and temporary files of all programs lie where the scanner looks.
        (folder / "tmp").mkdir()
        for name, value in (("PYENCLAVE_STATE", folder / "state"), ("TMPDIR", folder / "tmp")):
            stack.callback(_restore, name, os.environ.get(name))
            os.environ[name] = str(value)
        progress("building and signing the image")
        common = _prepare(folder)
        say(f"image      {Path(common['image']).stat().st_size:,} bytes, signed by the owner")
        company = stack.enter_context(_Company())
        result = _main_job(company, folder, common, rows, say, progress)
        return {**result, "seconds": round(time.monotonic() - started, 2)}


def _main_job(
    company: _Company,
    folder: Path,
    common: dict[str, str],
    rows: int,
    say: Say,
    progress: Say,
) -> dict[str, Any]:
    log = folder / "service.log"
    owners_end, hosts_end = socket.socketpair()
    progress("starting host, enclave and owner")
    host = _Program(company, "pyenclave.demo.service", common["image"], str(log), line=hosts_end)
    owner = _Program(
        company,
        "pyenclave.demo.owner",
        common["image"],
        str(rows),
        str(owners_end.fileno()),
        extra=owners_end,
    )
    owners_end.close()
    line = owner.peer

    trained, _ = _step(line, "trained")
    say(
        f"owner      trained on {trained['trained_on']:,} of its applicants; "
        f"{trained['rows']:,} are to be scored, {trained['columns']} columns each"
    )
    started, _ = _step(line, "host")
    say(
        f"processes  owner {owner.process.pid}, host {host.process.pid}, "
        f"enclave {started['worker']}"
    )

    certificate = pyenclave.local_platform_root().public_bytes(Encoding.DER)
    common["root"] = certificate.hex()
    fingerprint = hashlib.sha256(certificate).hexdigest()
    say(f"enrolment  the owner enrols this platform's root {fingerprint[:32]}…")
    say("           it thereby trusts whoever owns the file behind it: in embedded mode, this user")
    line.send({}, certificate)

    verified, evidence = _step(line, "verified")
    passed = sum(outcome == "passed" for _, outcome in verified["checks"])
    say(
        f"evidence   {len(evidence):,} bytes; {passed} checks passed; "
        f"MRENCLAVE {verified['mrenclave'][:16]}… is the one of the owner's image"
    )
    common.update(evidence=evidence.hex(), nonce=verified["nonce"])
    keys, _ = _step(line, "keys")
    say("keys       sent, encrypted to that enclave's runtime key; the host relayed ciphertext")

    progress("scoring, while a scanner searches the host")
    line.send({})
    with ThreadPoolExecutor(1) as pool:
        scan = pool.submit(_scan, [host.process.pid], [str(folder)], keys["patterns"])
        scored, _ = _step(line, "scored")
        result = scan.result()
    # Once more with the results there, the enclave idle and the log written.
    after = _scan([host.process.pid], [str(folder)], keys["patterns"])
    searched, found = result["searched"] + after["searched"], result["found"] + after["found"]
    if not scored["equal"]:
        raise EnclaveError("the enclave's scores differ from the owner's own computation")
    say(
        f"scores     {scored['rows']:,} applicants, accuracy {scored['accuracy']:.4f}; "
        "equal to the owner's own computation, bit for bit"
    )
    say(
        f"speed      {scored['rows'] / scored['seconds']:,.0f} applicants/s through the enclave, "
        f"{scored['rows'] / scored['outside_seconds']:,.0f}/s by the same model outside"
    )
    held, most = scored["sealed"]
    say(
        f"memory     {held / 1e6:,.1f} MB of applicants in sealed memory; with what is computed "
        f"from them at most {most / 1e6:,.1f} MB plaintext at a time"
    )
    plain = _Program(company, "pyenclave.demo.unprotected")
    exposed, _ = plain.peer.receive()
    # The same scanner on the unprotected copy: nothing found means something only if it can find.
    control = _scan([exposed["pid"]], [], exposed["patterns"])["found"]
    say(
        f"scanner    searched {searched / 1e6:,.0f} MB of the host's memory, rings, files and logs "
        f"for {len(keys['patterns'])} keys, rows and weights: {found} found"
    )
    say(f"           the same scanner in the unprotected copy's memory: {control} found")

    progress("attacking")
    targets = {
        "enclave": {"pid": started["worker"], "patterns": keys["patterns"]},
        "unprotected": {"pid": exposed["pid"], "patterns": exposed["patterns"]},
    }
    attacks = _attacks(targets, common, progress)
    line.send({})  # the owner may go
    for attack in attacks:
        say(f"attack     {attack['name']:<20} {attack['enclave']}: {attack['detail']}")
        say(f"           {'':<20} without the enclave: {attack['unprotected']}")
    return {
        "rows": scored["rows"],
        "accuracy": scored["accuracy"],
        "equal": scored["equal"],
        "sealed_memory": {"bytes": held, "plaintext_at_most": most},
        "throughput": {
            "enclave_rows_per_second": scored["rows"] / scored["seconds"],
            "outside_rows_per_second": scored["rows"] / scored["outside_seconds"],
        },
        "scan": {
            "searched": searched,
            "found": found,
            "patterns": len(keys["patterns"]),
            "unprotected_found": control,
        },
        "attacks": [
            {name: attack[name] for name in ("name", "enclave", "unprotected")}
            for attack in attacks
        ],
    }


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _step(line: Peer, name: str) -> tuple[dict[str, Any], bytes]:
    try:
        header, body = line.receive()
    except EnclaveError:
        raise EnclaveError(
            f"the owner ended before the step {name!r}; see its message above"
        ) from None
    if header.get("step") != name:
        raise EnclaveError("the owner is at another step", expected=name, found=header)
    return header, body


def _attacks(
    targets: dict[str, dict[str, Any]], common: dict[str, str], progress: Say
) -> list[dict[str, str]]:
    results = []
    for name in (*memory.ATTACKS, *tamper.ATTACKS):
        progress(f"attacking: {name}")
        outcomes = []
        for target, process in targets.items():
            folder = Path(common["folder"]) / name / target
            folder.mkdir(parents=True)
            order = {**common, **process, "folder": str(folder), "target": target}
            outcomes.append(_attack(name, order))
        results.append(_row(name, *outcomes))
    return results


def _row(name: str, enclave: dict[str, str], unprotected: dict[str, str]) -> dict[str, str]:
    return {
        "name": name,
        "enclave": enclave["outcome"],
        "unprotected": unprotected["outcome"],
        "detail": textwrap.shorten(enclave["detail"], 110, placeholder=" …"),
    }
