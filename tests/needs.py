"""What some tests need that pip does not install. Without it they are skipped, and say what to install; where the
suite has to be whole (ALL_TESTS is set, as .ci/run does), they run all the same, and fail."""

import importlib.util
import os
import shutil

import pytest

from llama.model.kernels import native

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


def _needs(is_there: bool, what: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_there and not os.environ.get("ALL_TESTS"), reason=f"needs {what}")


needs_browser = _needs(bool(CHROMIUM and CHROMEDRIVER), "a browser: apt-get install chromium chromium-driver")
needs_curl = _needs(shutil.which("curl") is not None, "curl: apt-get install curl")
needs_lm_eval = _needs(importlib.util.find_spec("lm_eval") is not None, 'lm_eval: pip install -e ".[clients]"')
needs_kernels = _needs(native.library() is not None, f"the compiled kernels, but {native.why_not()}")
