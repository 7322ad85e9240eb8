"""Who asks, and what he may do: bearer tokens, roles, an issuer for development."""
