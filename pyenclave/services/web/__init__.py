"""
What every service is made of: strict requests, limits, errors, TLS, the server.

`kit` has `Service`, `Call` and `Answer`; `run` the server; `tls` certificates for development;
`config` what a service is told at its start.
"""
