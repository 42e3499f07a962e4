"""``grpc.Future``, of a call that blocks no thread."""

from .._adopt import once

adopt = once()
