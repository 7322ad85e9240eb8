"""The services: attestation, key vault, identity and what they stand on. ASGI and SQL live here."""
