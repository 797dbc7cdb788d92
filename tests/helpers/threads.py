"""Calls of one object from several threads at once."""

import sys
from concurrent.futures import ThreadPoolExecutor


def in_threads(run, clients=4):
    """``run(client)`` of every client in a thread of its own, which take turns as often as Python lets them.

    The first exception is raised.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(run, range(clients)))
    finally:
        sys.setswitchinterval(interval)
