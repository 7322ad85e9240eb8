"""Why a token is refused: one word each, for logs and for the caller, and what it means."""

from __future__ import annotations

from typing import Final

__all__ = ["REASONS", "TokenRefused"]

REASONS: Final = {
    # The header field.
    "scheme": "the Authorization header is not 'Bearer TOKEN'",
    "oversized": "the token is larger than 16 KiB",
    # The form.
    "encrypted": "the token is encrypted (JWE), not signed",
    "serialisation": "the token is not in the compact serialisation",
    "parts": "the token does not have three parts",
    "encoding": "a part of the token is not canonical base64url",
    "header_json": "the token's header is not a JSON object",
    "payload_json": "the token's payload is not a JSON object",
    "duplicate": "the token names a member twice",
    # The header.
    "alg_none": "the token is not signed (alg none)",
    "alg_symmetric": "the token is signed with a shared secret (alg HS…)",
    "alg_missing": "the token's alg is missing or not text",
    "algorithm": "the token's alg is not one that this issuer signs with",
    "crit": "the token has critical header parameters",
    "unencoded": "the token has an unencoded payload (b64)",
    "compressed": "the token is compressed (zip)",
    "password": "the token's key is made from a password (PBES2)",
    "encryption_parameter": "the token has header parameters of encryption",
    "embedded_key": "the token brings or names its own key (jku, x5u, jwk)",
    "token_type": "the token's typ is not that of an access token",
    "nested": "the token wraps another token (cty)",
    "kid_missing": "the token does not name its key (kid)",
    "kid_malformed": "the token's kid is not the name of a key",
    # The key.
    "unknown_kid": "the issuer has no key of that name",
    "key_unusable": "the issuer's key of that name is not for signatures, or too weak",
    "key_algorithm": "the token's alg is not the one of its key",
    "signature": "the signature does not hold",
    "keys_unavailable": "the issuer's keys cannot be had now",
    "keys_expired": "the issuer's keys are too old, and cannot be had anew",
    # The claims.
    "iss_missing": "iss is missing or not text",
    "issuer": "the issuer is not one that is trusted",
    "tenant_missing": "tid is missing or not text",
    "tenant": "the tenant is not one that is let in",
    "tenant_issuer": "tid is not the tenant of iss",
    "version": "ver does not belong to this issuer",
    "aud_missing": "aud is missing, or neither text nor a list of text",
    "audience": "the token is meant for somebody else",
    "exp_missing": "exp is missing",
    "exp_type": "exp is not a whole number",
    "exp_huge": "exp is no moment of ours",
    "expired": "the token has expired",
    "nbf_missing": "nbf is missing",
    "nbf_type": "nbf is not a whole number",
    "not_yet": "the token is not yet valid",
    "iat_missing": "iat is missing",
    "iat_type": "iat is not a whole number",
    "iat_future": "the token was issued in the future",
    "lifetime": "the token lives longer than tokens of this issuer may",
    "id_token": "the token is an ID token, not an access token",
    "scp_type": "scp is not text",
    "roles_type": "roles is not a list of text",
    "idtyp": "idtyp contradicts the other claims",
    "client_type": "azp or appid is not text",
    "client": "the application is not one that is let in",
    "kind": "neither the application itself nor its user is let in",
    "principal": "the claim that names the principal is missing or not text",
}


class TokenRefused(Exception):  # noqa: N818 - a verdict
    """
    Carries a reason out of validation.

    Attributes:
        reason: A key of `REASONS`.
        found: What was found, for the log.

    """

    def __init__(self, reason: str, found: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.found = found
