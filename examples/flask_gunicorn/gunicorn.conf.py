"""Settings of gunicorn for app.py."""

from __future__ import annotations

preload_app = True
workers = 2
threads = 4
bind = "127.0.0.1:8000"


def post_fork(server, worker):
    """Open the enclave in each worker, after the fork."""
    import app

    app.enclave()


def worker_exit(server, worker):
    """End it with its worker; a killed worker's enclave ends by itself."""
    import app

    app.enclave().close()
