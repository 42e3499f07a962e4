"""Skip the stand-in's tests unless PyTorch runs on the stand-in."""

from . import IS_INSTALLED

collect_ignore_glob = [] if IS_INSTALLED else ["test_*.py"]
