"""One fused op: its schema, fake kernels, autograd and backend dispatch, each declared once.

An op is a subclass of ``FusedOp`` with the pieces that differ from op to op. What it gets for them:

* ``torch.ops.pytransformer.<op>_fwd`` and ``<op>_bwd``, which serve under ``torch.compile``, export, fake
  tensors, dispatch modes and tensor subclasses;
* one ``autograd.Function``, called directly in plain eager mode, where the dispatcher's round trips would
  cost more than a small kernel;
* a double backward, through the reference's differentiable backward.

The last argument of either op is the name of the backend, chosen before the call: a traced graph keeps it.

A small kernel takes a microsecond, and checking its arguments takes ten. What the checks and the choice of a backend
look at is the signature of a call: types, dtypes, shapes and devices of its tensors, and its other arguments. So a
public function asks ``recall`` whether a call of this signature has passed before, and ``remember``s it once it has.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytransformer.backends import ORDER, implementation, settled
from pytransformer.ops._packed import packed_form

LIBRARY = torch.library.Library("pytransformer", "DEF")  # type: ignore[no-untyped-call]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state

_MOST_REMEMBERED = 4096
_remembered: dict[tuple[Any, ...], str] = {}


def obstacle(tensors: tuple[Tensor | None, ...]) -> str | None:
    """A reason against every compiled kernel that lies in the context of the call, or None."""
    if not torch.compiler.is_compiling() and _functorch_active():
        return "a functorch transform (vmap, grad, jvp, ...) is active, which only the reference composes with"
    for x in tensors:
        if x is not None and x.layout != torch.strided:
            return f"it takes strided tensors, not {x.layout}"
    return None


def needs_grad(*arguments: Any) -> bool:
    """Will autograd record a call with these arguments, tensors or not?"""
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def plain_eager(args: tuple[Any, ...]) -> bool:
    """Is this a call in plain eager mode, with nothing listening in between?"""
    if not _undisturbed():
        return False
    for x in args:
        kind = type(x)
        if kind is not Tensor and kind not in _PLAIN_TYPES and isinstance(x, Tensor):
            return False
    return True


def _undisturbed() -> bool:
    """Is nothing tracing, transforming or intercepting the calls of this thread?"""
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_active()
        or _tracing_state() is not None
    )


def recall(op: str, tensors: tuple[Any, ...], backend: str, *others: Any) -> tuple[tuple[Any, ...] | None, str | None]:
    """``(signature, name)``: the signature of a call, None where it is no plain one, and the name of the backend that
    serves it, None where no such call has passed all checks yet.

    Args:
        op: the public function.
        tensors: every argument that may be a tensor.
        backend: the one asked for.
        others: every other argument that a check or a backend's ``why_not`` looks at.
    """
    if not _undisturbed() or (forced := settled()) is None:
        return None, None
    signature: list[Any] = [op, backend, forced, *others]
    device = "cpu"
    for x in tensors:
        if type(x) in _PLAIN_TYPES:
            if not x.is_cpu:
                device = x.device.type
                signature.append(x.device)
            signature += (x.dtype, x.shape, x.layout)
        elif isinstance(x, Tensor):
            return None, None
        else:
            signature.append(x)
    if device not in ORDER or torch.is_autocast_enabled(device):
        return None, None
    key = tuple(signature)
    try:
        return key, _remembered.get(key)
    except TypeError:  # an argument of a wrong type, which the checks will name
        return None, None


def remember(signature: tuple[Any, ...] | None, name: str) -> None:
    """A call of this signature has passed, and backend ``name`` serves it."""
    if signature is not None:
        if len(_remembered) >= _MOST_REMEMBERED:  # every step of a decoding has lengths of its own
            _remembered.clear()
        _remembered[signature] = name


class FusedOp:
    """Base of the ops. A subclass is a namespace of static methods; calling an instance runs the op.

    Attributes:
        name: the op's name.
        forward_schema: arguments and results of ``<op>_fwd`` without the final backend.
        backward_schema: the same for ``<op>_bwd``.
    """

    name: ClassVar[str]
    forward_schema: ClassVar[str]
    backward_schema: ClassVar[str]

    @staticmethod
    def fake_forward(*args: Any) -> tuple[Tensor, ...]:
        """Empty outputs of the right shapes and dtypes."""
        raise NotImplementedError

    @staticmethod
    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        """Empty gradients of the right shapes and dtypes."""
        raise NotImplementedError

    @staticmethod
    def save(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The tensors that the backward needs, and everything else that it needs."""
        raise NotImplementedError

    @staticmethod
    def backward_args(
        saved: tuple[Tensor | None, ...],
        extra: tuple[Any, ...],
        grads: tuple[Tensor | None, ...],
        needs: tuple[bool, ...],
    ) -> tuple[Any, ...]:
        """The arguments of ``<op>_bwd``; ``needs`` says which of the forward's arguments want a gradient."""
        raise NotImplementedError

    @staticmethod
    def input_grads(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """One gradient or None for each argument of the forward, from what ``<op>_bwd`` returned."""
        raise NotImplementedError

    # How many of the outputs carry gradients; they come first.
    differentiable_outputs: ClassVar[int] = 1
    # Where among the arguments of ``<op>_fwd`` and ``<op>_bwd`` a mask stands that a backend may pack.
    masks_at: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        forward_name, backward_name = f"{self.name}_fwd", f"{self.name}_bwd"
        tags = (torch.Tag.pt2_compliant_tag,)
        for name, schema, run, fake in (
            (forward_name, self.forward_schema, self._forward, self.fake_forward),
            (backward_name, self.backward_schema, self._backward, self.fake_backward),
        ):
            LIBRARY.define(name + _with_backend(schema), tags=tags)  # type: ignore[no-untyped-call]
            LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
            torch.library.register_fake(f"pytransformer::{name}", _without_backend(fake), lib=LIBRARY)
        torch.library.register_autograd(
            f"pytransformer::{forward_name}",
            self._autograd_backward,
            setup_context=self._setup_context,
            lib=LIBRARY,
        )
        self.library_forward = getattr(torch.ops.pytransformer, forward_name).default
        self.library_backward = getattr(torch.ops.pytransformer, backward_name).default
        self.function = self._make_function()
        self._forward_name, self._backward_name = forward_name, backward_name
        self._inference_name = f"{self.name}_inference"

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if plain_eager(args):
            return self.eager(*args)
        result: tuple[Tensor, ...] = self.library_forward(*args)
        return result

    def eager(self, *args: Any) -> tuple[Tensor, ...]:
        """The call in plain eager mode."""
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    result: tuple[Tensor, ...] = self.function.apply(*args)  # type: ignore[attr-defined]
                    return result
        module = implementation(args[-1], self.name)
        inference = getattr(module, self._inference_name, None)
        if inference is None:
            return self._run(self._forward_name, args, eager=True)
        found: tuple[Tensor, ...] = inference(*args[:-1])
        return found

    def _forward(self, *args: Any, eager: bool = False) -> tuple[Tensor, ...]:
        return self._run(self._forward_name, args, eager)

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        return self._run(self._backward_name, args, eager=False)

    def _eager_backward(self, *args: Any) -> tuple[Tensor, ...]:
        return self._run(self._backward_name, args, plain_eager(args))

    def _run(self, function_name: str, args: tuple[Any, ...], eager: bool) -> tuple[Tensor, ...]:
        *args_of_backend, backend = args
        module = implementation(backend, self.name)
        function = getattr(module, function_name)
        if eager and self.masks_at and getattr(module, "PACKS_MASKS", False):
            mask = args[self.masks_at[function_name[-3:]]]
            if mask is not None:
                function = partial(function, packed=packed_form(mask, backend))
        result: tuple[Tensor, ...] = function(*args_of_backend)
        return result

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saved, ctx.extra = self.save(inputs[:-1], output)
        ctx.backend = inputs[-1]
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*output[self.differentiable_outputs :])
        ctx.set_materialize_grads(False)

    def _autograd_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return self._differentiate(ctx, grads, self.library_backward)

    def _differentiate(self, ctx: Any, grads: tuple[Tensor | None, ...], run: Any) -> tuple[Tensor | None, ...]:
        used = grads[: self.differentiable_outputs]
        needs = ctx.needs_input_grad[:-1]
        if all(g is None for g in used):
            return (None,) * (len(needs) + 1)
        args = self.backward_args(ctx.saved_tensors, ctx.extra, used, needs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True: a double backward
            found = self._backward(*args, "reference")
        else:
            found = run(*args, ctx.backend)
        return (*self.input_grads(found, needs), None)

    def _make_function(self) -> type:
        op = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
                outputs = op._forward(*args, eager=True)
                op._setup_context(ctx, args, outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return op._differentiate(ctx, grads, op._eager_backward)

        Function.__name__ = Function.__qualname__ = f"{self.name}_function"
        return Function


def _with_backend(schema: str) -> str:
    arguments, arrow, results = schema.partition(") ->")
    return f"{arguments}, str backend{arrow}{results}"


def _without_backend(fake: Any) -> Any:
    return lambda *args: fake(*args[:-1])
