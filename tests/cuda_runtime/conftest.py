"""Skip the stand-in's tests unless PyTorch runs on the stand-in."""

from . import IS_THERE

collect_ignore_glob = [] if IS_THERE else ["test_*.py"]
