"""LaunchPolicy: which images this platform starts, from ``launch-policy.toml``; fail closed."""

from __future__ import annotations

import functools
import tomllib
from typing import Annotated, Final

import msgspec

from pyenclave._platform.state import State
from pyenclave.errors import LaunchRefusedError

__all__ = ["MAX_ENCLAVES", "POLICY_FILE", "LaunchPolicy", "SignerRule", "load_policy"]

POLICY_FILE: Final = "launch-policy.toml"
#: The most enclaves that a platform has; each takes descriptors and a thread.
MAX_ENCLAVES: Final = 2048
_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class SignerRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A signer that may launch.

    Attributes:
        mrsigner: SHA-256 of the signer's modulus, hexadecimal.
        product_id: Only this product; None for every product of the signer.
        security_version: The lowest ISVSVN that is started: one that went back is refused.

    """

    mrsigner: _Hex32
    product_id: _U16 | None = None
    security_version: _U16 = 0


class LaunchPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Rules of the platform for launches. The default starts whatever the user's own images ask for.

    Attributes:
        allow_debug: Debug enclaves may start.
        allow_unsigned: Unsigned images may start (as debug only, in any case).
        allow_ephemeral: Data sealing and counters work although the root lives in memory only.
        require: Protection bits that every launch must show.
        max_enclaves: How many enclaves there may be at a time, warm workers included.
        max_warm: How many warm workers one host may reserve.
        signer: If there is one rule or more, a signed image must match a rule; where several
            match, all their security versions count.

    """

    allow_debug: bool = True
    allow_unsigned: bool = True
    allow_ephemeral: bool = False
    require: tuple[str, ...] = ()
    max_enclaves: Annotated[int, msgspec.Meta(ge=1, le=MAX_ENCLAVES)] = MAX_ENCLAVES
    max_warm: Annotated[int, msgspec.Meta(ge=0, le=MAX_ENCLAVES)] = 64
    signer: tuple[SignerRule, ...] = ()

    def judge(
        self, *, mrsigner: bytes, product_id: int, security_version: int, debug: bool
    ) -> None:
        """
        Refuse an image that the policy does not start.

        Args:
            mrsigner: 32 bytes; zero for an unsigned image.
            product_id: ISVPRODID.
            security_version: ISVSVN.
            debug: Whether it would start as debug.

        Raises:
            LaunchRefusedError: A rule says no; the message names it.

        """
        if debug and not self.allow_debug:
            raise LaunchRefusedError(f"{POLICY_FILE}: allow_debug", expected="a production launch")
        if not any(mrsigner):
            if not self.allow_unsigned:
                raise LaunchRefusedError(f"{POLICY_FILE}: allow_unsigned", expected="a signature")
            return
        if not self.signer:
            return
        found = mrsigner.hex()
        matching = [
            rule
            for rule in self.signer
            if rule.mrsigner == found and rule.product_id in (None, product_id)
        ]
        if not matching:
            raise LaunchRefusedError(
                f"{POLICY_FILE}: no rule for this signer and product",
                expected=", ".join(sorted({rule.mrsigner for rule in self.signer})),
                found=f"{found}, product {product_id}",
            )
        lowest = max(rule.security_version for rule in matching)
        if security_version < lowest:
            raise LaunchRefusedError(
                f"{POLICY_FILE}: the image's security version went back",
                expected=f"at least {lowest}",
                found=security_version,
            )


_DEFAULT: Final = LaunchPolicy()


def load_policy(state: State | None) -> LaunchPolicy:
    """
    Read the policy of *state*; the default if there is no file.

    While the file's bytes are the same, so is the object.

    Raises:
        LaunchRefusedError: The file is not a valid policy. Nothing starts until it is.
        PlatformUnavailableError: The file cannot be read or others may write it.

    """
    if state is None or not state.exists:
        return _DEFAULT
    data = state.read_file(POLICY_FILE, limit=256 * 1024)
    if data is None:
        return _DEFAULT
    try:
        return _parse(data)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:  # of tomllib, all
        raise LaunchRefusedError(
            f"{state.path}/{POLICY_FILE} is not a valid policy: {error}",
            advice="Nothing starts until it is corrected or removed.",
        ) from None


@functools.lru_cache(maxsize=4)
def _parse(data: bytes) -> LaunchPolicy:
    # Read for each launch, parsed when its bytes change.
    return msgspec.convert(tomllib.loads(data.decode("utf-8")), LaunchPolicy, strict=True)
