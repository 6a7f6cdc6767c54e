"""Processes of one's own: fresh interpreters that end with whoever started them, however that ended."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """So many processes to hand work to; they start empty and outlive nobody, not even a killed parent."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
