"""Who waits for which future, since when, and what happened: for a program that hangs, or lags.

`pending_futures` lists what is pending now. A `Recording` notes waits and callbacks while it is on,
and saves them as a trace for Perfetto. While none is on, the package runs as if this were not here.
"""

from .._loops import Who
from .._public import publish
from ._pending import PendingFuture, PendingStream, pending_futures
from ._recording import Recording

__all__ = ["PendingFuture", "PendingStream", "Recording", "Who", "pending_futures"]

publish(__name__)
