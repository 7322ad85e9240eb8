"""``pyenclave demo --services``: an owner's key, a vault, an attestation service and an enclave."""
