"""Verifying evidence and appraising it against a policy."""
