"""How long it takes, how exact it is and how far it carries: everything here only measures."""

import time

BEGAN = time.perf_counter()  # of a command `python -m benchmarks.NAME`: before torch is imported
