"""Hypothesis searches for operations after which a future differs from its documentation."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchfut_aio import CallbackError, Future, InvalidStateError, collect_all, gather

ERRORS = [ValueError, KeyError, OSError, KeyboardInterrupt, asyncio.CancelledError]
outcomes = st.one_of(
    st.tuples(st.just("result"), st.integers()),
    st.tuples(st.just("error"), st.sampled_from(ERRORS).map(lambda kind: kind("model"))),
)


class Model:
    """A future as documented: its outcome, and the callbacks that have run."""

    def __init__(self, fut):
        self.fut = fut
        self.outcome = None
        self.expected = []  # what callbacks should have logged so far
        self.log = []
        self.on_done = []  # in the order in which they were added

    def complete(self, outcome):
        if self.outcome is not None:
            return  # a child or a combined future that the program has already completed
        self.outcome = outcome
        for act in self.on_done:
            act()
        self.on_done = []

    def when_done(self, act):
        if self.outcome is None:
            self.on_done.append(act)
        else:
            act()


class FutureAgainstItsDocumentation(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.models = [Model(Future())]
        self.calls = 0

    def pick(self, data, pending=None):
        choices = [m for m in self.models if pending is None or (m.outcome is None) == pending]
        return data.draw(st.sampled_from(choices)) if choices else None

    @precondition(lambda self: len(self.models) < 25)
    @rule()
    def make(self):
        self.models.append(Model(Future()))

    @rule(data=st.data(), outcome=outcomes)
    def complete(self, data, outcome):
        model = self.pick(data)
        kind, value = outcome
        set_it = model.fut.set_result if kind == "result" else model.fut.set_exception
        if model.outcome is None:
            model.complete(outcome)
            set_it(value)
        else:
            with pytest.raises(InvalidStateError, match="only be marked completed once"):
                set_it(value)

    @rule(data=st.data(), value=st.one_of(st.none(), st.integers(), st.just(ValueError)))
    def refuse_what_is_no_exception(self, data, value):
        with pytest.raises(TypeError):
            self.pick(data).fut.set_exception(value)

    @rule(data=st.data())
    def add_done_callback(self, data):
        model = self.pick(data)
        self.calls += 1
        call = self.calls

        def callback(fut, model=model):
            assert fut is model.fut
            assert fut.done()
            model.log.append(call)

        model.when_done(lambda: model.expected.append(call))
        model.fut.add_done_callback(callback)

    @rule(data=st.data())
    def add_and_remove(self, data):
        model = self.pick(data, pending=True)
        if model is not None:
            model.fut.add_done_callback(model.log.append)
            model.fut.add_done_callback(model.log.append)
            assert model.fut.remove_done_callback(model.log.append) == 2

    @precondition(lambda self: len(self.models) < 25)
    @rule(data=st.data(), result=outcomes)
    def then(self, data, result):
        parent = self.pick(data)
        kind, value = result

        def callback(fut):
            if kind == "error":
                raise value
            return value

        child = Model(None)

        def expect():
            wrapped = kind == "error" and isinstance(value, Exception)
            child.complete(("callback error", value) if wrapped else result)

        parent.when_done(expect)
        child.fut = parent.fut.then(callback)
        self.models.append(child)

    @precondition(lambda self: len(self.models) < 25)
    @rule(data=st.data(), n=st.integers(0, 4), early=st.booleans())
    def combine(self, data, n, early):
        models = [self.pick(data) for _ in range(n)]
        combined = Model((gather if early else collect_all)([m.fut for m in models]))

        def expect(just_done=None):
            failures = [m.outcome for m in models if m.outcome and m.outcome[0] != "result"]
            if early and just_done is not None and just_done.outcome[0] != "result":
                combined.complete(just_done.outcome)  # the first that was done
            elif not all(m.outcome for m in models):
                return
            elif failures:
                combined.complete(failures[0])  # the first in the list
            else:
                values = [m.outcome[1] for m in models] if early else [m.fut for m in models]
                combined.complete(("result", values))

        for model in models:
            model.when_done(lambda model=model: expect(model))
        expect()
        self.models.append(combined)

    @rule(data=st.data())
    def time_out(self, data):
        model = self.pick(data, pending=True)
        if model is not None:
            with pytest.raises(TimeoutError):
                model.fut.wait(timeout=0)

    @invariant()
    def every_future_is_as_documented(self):
        for model in self.models:
            fut = model.fut
            assert model.log == model.expected
            assert fut.done() == (model.outcome is not None)
            assert torch._C.Future.done(fut) == fut.done()
            if model.outcome is None:
                with pytest.raises(InvalidStateError):
                    fut.value()
                continue
            kind, value = model.outcome
            readers = [fut.value, fut.wait, lambda fut=fut: torch._C.Future.wait(fut)]
            if kind == "result":
                assert all(read() is value or read() == value for read in readers)
                continue
            error = fut.exception()
            if kind == "callback error":
                assert isinstance(error, CallbackError)
                assert isinstance(error, type(value))
                assert error.__cause__ is value
            else:
                assert error is value
            for read in readers:
                with pytest.raises(type(value)) as caught:
                    read()
                assert caught.value is error


FutureAgainstItsDocumentation.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestFutureAgainstItsDocumentation = FutureAgainstItsDocumentation.TestCase
