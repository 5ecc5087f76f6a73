"""What every test shares: one thread, no network, and hypothesis without a clock."""

import os
import signal

# Before anything imports torch or transformers. A test that wants more threads asks torch for them itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU, Triton's kernels run in its interpreter (tests/kernels); triton reads this when it is imported.
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# The same examples in every run, none kept on disk, and no deadline: a busy machine is no failure.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

# A shell that starts a job in the background has it ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
