"""Shapes in signatures are checked in every test; nothing is read from or written to the user's cache."""

import os
import tempfile

from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"  # also in what tests start
os.environ["LOOKFAR_CACHE"] = os.environ.get("LOOKFAR_TEST_CACHE") or tempfile.mkdtemp(prefix="lookfar-tests-")
install_import_hook("lookfar", "beartype.beartype")

import torch  # noqa: E402  # after the hook

torch.set_num_threads(1)
