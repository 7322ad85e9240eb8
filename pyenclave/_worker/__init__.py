"""The enclave process: zygote, importer, dispatch."""
