"""Settings of gunicorn for app.py."""

from __future__ import annotations

preload_app = True
workers = 2
threads = 4
bind = "127.0.0.1:8000"


def post_worker_init(worker):
    """
    Open the enclave in each worker.

    Not in post_fork: launching takes a moment, and until a worker has set its signal handlers a
    SIGTERM is lost in it.
    """
    import app

    app.enclave()


def worker_exit(server, worker):
    """End it with its worker; a killed worker's enclave ends by itself."""
    import app

    app.enclave().close()
