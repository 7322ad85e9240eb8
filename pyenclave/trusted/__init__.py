"""What trusted code may use inside an enclave."""
