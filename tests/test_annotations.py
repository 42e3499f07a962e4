"""``Future[int]`` as an annotation in running programs."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Generic, TypeVar

import pytest
import torch
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from torchfut_aio import Future

T = TypeVar("T")


def test_ddp_accepts_a_hook_annotated_with_our_future(group_of_one):
    def hook(state, bucket):
        fut = Future()
        fut.set_result(bucket.buffer())
        return fut

    hook.__annotations__.update(bucket=GradBucket, **{"return": Future[torch.Tensor]})
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.register_comm_hook(None, hook)
    model(torch.ones(1, 2)).sum().backward()
    assert model.module.weight.grad.tolist() == [[1, 1], [1, 1]]


def test_ddp_still_refuses_other_annotations(group_of_one):
    def hook(state, bucket):
        return Future()

    hook.__annotations__.update(bucket=GradBucket, **{"return": Future[int]})
    with pytest.raises(ValueError, match="return annotation"):
        DistributedDataParallel(torch.nn.Linear(2, 2)).register_comm_hook(None, hook)


def make():
    fut = Future()
    fut.set_result(torch.ones(1))
    return fut


make.__annotations__["return"] = Future[torch.Tensor]
torch.jit.ignore(make)


def use():
    fut = make()
    return fut.wait()  # PyTorch's own supports no `+` either


use.__annotations__["return"] = torch.Tensor


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is:FutureWarning")
def test_torchscript_accepts_functions_annotated_with_our_future():
    assert torch.jit.script(use)().tolist() == [1]


def test_annotation_survives_patching_torch_futures_future(monkeypatch):
    theirs = torch.futures.Future
    monkeypatch.setattr(torch.futures, "Future", Future)
    assert Future[int] == theirs[int]
    assert torch._jit_internal.is_future(Future[int])  # TorchScript's check


def test_annotation_equals_only_the_annotation_of_pytorch():
    for args in (int, torch.Tensor, int | None, "forward", None):
        assert Future[args] == Future[args]
        assert Future[args] == torch.futures.Future[args]
        assert torch.futures.Future[args] == Future[args]
        assert not (Future[args] != torch.futures.Future[args])  # noqa: SIM202
        assert hash(Future[args]) == hash(torch.futures.Future[args])
    for other in (Future[str], torch.futures.Future[str], list[int], Future, int, None):
        assert Future[int] != other
        assert other != Future[int]


def test_calling_the_annotation_makes_our_future():
    fut = Future[int](devices=[])
    assert type(fut) is Future


def test_annotation_is_not_a_class():
    assert not isinstance(Future[int], type)
    with pytest.raises(TypeError):
        isinstance(Future(), Future[int])


def test_classes_can_derive_from_the_annotation():
    class Numbers(Future[int]):
        pass

    class Ours(Future[T]):
        pass

    class Both(Future[T], Generic[T]):
        pass

    assert Numbers.__mro__[1] is Future
    for kind in (Numbers, Ours, Both, Ours[int], Both[int]):
        assert isinstance(kind(), Future)
    assert typing.get_origin(Ours[int]) is Ours
    assert Ours.__parameters__ == Both.__parameters__ == (T,)
    with pytest.raises(TypeError):
        Numbers[str]


def test_typing_reads_the_annotation():
    def function(fut: Future[int], other: Future[T] | None = None) -> str: ...

    hints = typing.get_type_hints(function, localns={"T": T})
    assert hints["fut"] == Future[int]
    assert typing.get_args(Future[int]) == (int,)
    assert Future[T][int] == Future[int]
    assert Future[T].__parameters__ == (T,)
    assert (Future[T] | None)[int] == (Future[int] | None)
    assert {None | Future[int], Future[int] | None} == {Future[int] | None}
    assert repr(Future[int]).endswith("Future[int]")
    with pytest.raises(TypeError):
        Future[int, str]


def test_annotation_can_be_copied_and_pickled():
    for copied in (copy.copy(Future[int]), copy.deepcopy(Future[int])):
        assert copied == Future[int]
    again = pickle.loads(pickle.dumps(Future[int]))
    assert again == Future[int]
    assert type(again()) is Future
