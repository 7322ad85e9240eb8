"""The host's side: handles of enclaves."""
