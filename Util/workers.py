"""What every process that works for another one does first."""

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however it did.

    Otherwise one whose parent was killed may wait for ever to hand over its result. Does nothing in
    a process that no other started.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
