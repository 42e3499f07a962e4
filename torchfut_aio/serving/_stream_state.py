"""The state of a stream: its values, the tasks and threads that wait, and how it has ended.

No lock is held, so a signal handler or a finaliser may put, read or close at any moment. A value is
a key of ``values`` from the put to the read. To store or delete a key is one statement, within
which CPython checks for no signal.
"""

from __future__ import annotations

from collections import deque

from .. import _core
from .._cpython import Queue, move_to_front
from .._errors import StreamClosedError, without_frames
from .._waiters import EVERYONE, Waiters, first

ROOM = (None,)  # for one value

_CLOSED = "closed"
_LEFT = "left"
_READ = "read"


class StreamState:
    """The state that a stream shares with its iterators.

    Attributes:
        values: The outcomes that were put and not read, as keys, in order.
        room: An item for each value that may still be put; None if the stream is not bounded.
        owed: The values whose reading adds no item to ``room``; see `end_read`.
        end: Empty while the stream takes values. Afterwards it has a key for each reason: closed,
            with an error or None; left by its readers; read to its end by an iterator.
        listeners: The iterators that may read, each by a separate key.
        readers: The tasks and threads that wait for a value.
        writers: The tasks and threads that wait for room.
    """

    __slots__ = ("end", "listeners", "owed", "readers", "room", "values", "writers")

    def __init__(self, max_size: int | None) -> None:
        # A plain dict takes the longer to find its first key the more were deleted before it.
        self.values: dict[_core.Outcome, None] = Queue()
        self.room = None if max_size is None else [*ROOM] * max_size
        self.owed: dict[_core.Outcome, None] = {}
        self.end: dict[str, _core.Outcome | None] = {}
        self.listeners: dict[object, None] = {}
        self.readers = Waiters()
        self.writers = Waiters()

    # --------------------------------------------------------------------- putting

    def put(self, outcome: _core.Outcome) -> bool:
        """Add a value to the stream. Return False if it is full.

        Raises:
            StreamClosedError: The stream takes no more values, and this one is not in it.
        """
        if self.end:
            self._refuse()
        room = self.room
        if room is not None:
            # Take room *before* storing. A read deletes the value before it adds room, so the
            # stream is never longer than its bound.
            try:
                del room[-1]
            except IndexError:
                return False
        # Store *before* checking for the end. A reader sees the end, then checks for a value. So
        # the value is read or refused, whatever another thread does in between.
        self.values[outcome] = None
        if self.end:
            self._take_back([outcome])
        # Store *before* checking for readers. A reader joins, then checks for a value.
        if self.readers.waiting:
            try:
                self.readers.wake()
            except BaseException:
                self.readers.wake_again()
                raise
        return True

    def put_many(self, pending: deque[_core.Outcome]) -> None:
        """Move values from ``pending`` into the stream, as `put` does, while there is room.

        Raises:
            StreamClosedError: The stream takes no more values. Those that were not read are not
                in it.
        """
        if self.end:
            self._refuse()
        outcomes = [*pending]
        try:
            self._store(pending)
            if self.end:
                self._take_back(outcomes)
            if self.readers.waiting:
                self.readers.wake(len(outcomes) - len(pending))
        except BaseException:
            self.readers.wake_again(len(outcomes))
            raise

    # A separate function: see tests/test_backward_jumps.py.
    def _store(self, pending: deque[_core.Outcome]) -> None:
        values, room = self.values, self.room
        while pending:
            if room is not None:
                try:
                    del room[-1]
                except IndexError:
                    return
            # Not popleft(): an interrupt after that call would lose the value.
            values[pending[0]] = None
            del pending[0]

    def _take_back(self, outcomes: list[_core.Outcome]) -> None:
        taken_back = False
        for outcome in outcomes:
            try:
                del self.values[outcome]
            except KeyError:  # it was read, or had not been stored
                continue
            taken_back = True
            if self.room is not None:
                self.room += ROOM
        if taken_back:
            self._refuse()

    def _refuse(self) -> None:
        if _LEFT in self.end:
            raise StreamClosedError(
                "nothing listens to the stream any more: its readers left, by break, a "
                "cancellation, the end of a listen() block or stop_listening()"
            )
        raise StreamClosedError("the stream has been closed, and takes no more values")

    def can_write(self) -> bool:
        """Return True if a put would not block."""
        # Copies, which lock where there is no GIL: see CONTRIBUTING.md.
        return bool([*(self.room or ())]) or bool([*self.end])

    # --------------------------------------------------------------------- reading

    def can_read(self) -> bool:
        """Return True if a read would not block."""
        return bool([*self.values]) or bool([*self.end])  # as in can_write()

    def check_end(self, end: type[Exception]) -> None:
        """Raise the error of the end, or ``end`` if there is none, unless a value is left."""
        if self.values:  # it was put before the end: see put()
            return
        if _LEFT not in self.end:
            self.end[_READ] = None  # see leave()
        failed = self.end.get(_CLOSED)
        if failed is not None and _LEFT not in self.end:
            try:
                if not self.listeners:
                    self._keep_no_frames(failed)
                failed.read()
            finally:
                del self, failed  # as in Outcome.read()
        raise end

    def error_of_get(self) -> StreamClosedError:
        """Return the error of a get that found the stream at its end."""
        if _LEFT in self.end:
            return self._error_of_left()
        return StreamClosedError("the stream has been closed, and all its values have been read")

    def end_read(self, taken: _core.Outcome | None) -> None:
        """Put back the value that an interrupted reader has taken, and wake others for the rest.

        The call can be repeated if it is interrupted.
        """
        if taken is not None:
            if taken not in self.values:
                # The read has added room. Take it back, unless a put has used it. Then the stream
                # has a value too many, and the next read of this one adds no room.
                if self.room is not None and taken not in self.owed:
                    try:
                        del self.room[-1]
                    except IndexError:
                        self.owed[taken] = None
                self.values[taken] = None
            move_to_front(self.values, taken)
        self.hand_on()

    def hand_on(self) -> None:
        """Wake others for what is left, as a reader or writer leaves that may have been woken."""
        # It may not have been woken: a wake-up too many is harmless.
        if self.values and self.readers.waiting:
            self.readers.wake()
        if self.room and self.writers.waiting:
            self.writers.wake()

    # ---------------------------------------------------------------------- ending

    def is_closed(self) -> bool:
        """Return True if the producer has closed the stream."""
        return _CLOSED in self.end

    def is_listening(self) -> bool:
        """Return True if something listens, or nothing has yet."""
        return _LEFT not in self.end

    def check_listening(self) -> None:
        """Raise StreamClosedError if the reading side is closed."""
        if _LEFT in self.end:
            raise self._error_of_left()

    def _error_of_left(self) -> StreamClosedError:
        if first(self.end) == _CLOSED:  # which came first
            return StreamClosedError(
                "the stream has ended: it was closed, and then its readers left"
            )
        return StreamClosedError(
            "nothing listens to the stream any more, and its values were dropped: its readers "
            "left, by break, a cancellation, the end of a listen() block or stop_listening(); to "
            "read on after a break, stay in one block: with stream.listen() as values"
        )

    def close(self, error: _core.Outcome | None) -> None:
        """End the stream behind its last value, unless it has been closed before."""
        try:
            refused = self.end.setdefault(_CLOSED, error) is not error or _LEFT in self.end
            if refused and error is not None:
                error.mark_retrieved()  # nothing will retrieve it, so it must not be logged
            self._drop_error_if_left()
            self._wake_all()
        except BaseException:
            self._wake_all_again()
            raise

    def leave(self, listener: object) -> None:
        """Remove an iterator. If it was the last and the stream is not exhausted, `stop`."""
        self.listeners.pop(listener, None)
        if self.listeners:
            return
        # Values after the end was read are of a put that is about to take them back.
        if _READ not in self.end and (self.values or _CLOSED not in self.end):
            self.stop()
            return
        failed = self.end.get(_CLOSED)
        if failed is not None and failed.is_retrieved:
            self._keep_no_frames(failed)

    def stop(self) -> None:
        """Close the reading side, and drop the values in the stream."""
        self.end[_LEFT] = None  # *before* clearing: a put that comes later takes its value back
        try:
            error = self.end.get(_CLOSED)
            if error is not None:
                error.mark_retrieved()
            self._drop_error_if_left()
            self.values.clear()
            self._wake_all()
        except BaseException:
            self._wake_all_again()
            raise

    def _keep_no_frames(self, failed: _core.Outcome) -> None:
        # Frames in the traceback of an error lead to the stream, which would keep everything that
        # they hold. So if nothing listens, later readers raise a copy.
        if failed.error is not None:
            self.end[_CLOSED] = copied = _core.outcome_of_error(without_frames(failed.error))
            copied.mark_retrieved()

    def _drop_error_if_left(self) -> None:
        # For the same reason, and nothing will raise it.
        if _LEFT in self.end and _CLOSED in self.end:
            self.end[_CLOSED] = None

    def _wake_all(self) -> None:
        self.readers.wake(EVERYONE)
        self.writers.wake(EVERYONE)

    def _wake_all_again(self) -> None:
        self.readers.wake_again(EVERYONE)
        self.writers.wake_again(EVERYONE)
