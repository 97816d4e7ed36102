"""The peers: other people's fastest way to the same result, found where they are installed and fenced off.

One file for each, of a few lines. A peer that is not here says why; one that brings a runtime of its own runs in
a process of its own (``_processes``); one that is wrong against float64 gets no time, like everyone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch

from pytransformer.benchmarks._case import Case
from pytransformer.benchmarks._device import local
from pytransformer.benchmarks._processes import Remote, reason_of
from pytransformer.benchmarks._timing import Provider
from pytransformer.benchmarks.peers._peer import Peer

MODULES = ("sdpa", "flex_attention", "torch_compile", "zentorch", "openvino", "onnxruntime", "ctranslate2",
           "flash_attn", "xformers", "liger", "apex", "transformer_engine")  # fmt: skip


@cache
def every() -> dict[str, Peer]:
    """All peers by name."""
    modules = (importlib.import_module(f"{__name__}.{stem}") for stem in MODULES)
    return {peer.name: peer for module in modules for peer in module.PEERS}


def chosen(text: str, suite_uses_peers: bool, device: str = "cpu") -> tuple[str, ...]:
    """The names that ``--peers text`` stands for.

    Raises:
        ValueError: there is no such peer.
    """
    if text == "auto":
        if not suite_uses_peers:
            return ()
        if device == "cuda":
            return tuple(name for name, peer in every().items() if not peer.isolated)
        return tuple(name for name, peer in every().items() if peer.automatic and not peer.gpu)
    if text in ("all", "none"):
        return tuple(every()) if text == "all" else ()
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in every():
            known = ", ".join(every())
            raise ValueError(f"bench: --peers must be auto, all, none or names of {known}; got {name!r}")
    return names


def versions(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Each peer's version, or why it is absent."""
    found = {}
    for name in names:
        peer = every()[name]
        reason = peer.why_not()
        found[name] = {"absent": reason} if reason else {"version": peer.version()}
    return found


class Peers:
    """The peers of one run. Those with a process of their own keep it from case to case.

    Args:
        names: which; those that are absent are left out.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.peers = [every()[name] for name in names if every()[name].why_not() is None]
        self._remote: dict[str, Remote] = {}

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for remote in self._remote.values():
            remote.close()

    def join(self, case: Case, workload: Any) -> tuple[dict[str, Provider], dict[str, str]]:
        """The providers of those that can serve the case, and why the others cannot."""
        providers: dict[str, Provider] = {}
        absent: dict[str, str] = {}
        for peer in self.peers if workload is not None and not case.alone else ():
            if not peer.adapters.keys() & ({workload.op, "*"} if workload.traceable else {workload.op}):
                continue  # the op is no concern of this peer
            if case.device == "cuda" and not peer.automatic and peer.name not in case.targets:
                continue  # it compiles for many seconds: in the rows that hold us against it
            try:
                providers[peer.name] = self._provider(peer, case, workload)
            except Exception as error:  # other people's code: the row says what it raised
                absent[peer.name] = reason_of(error)
        return providers, absent

    def _provider(self, peer: Peer, case: Case, workload: Any) -> Provider:
        if not peer.isolated:
            return local(workload.provider(peer.function(workload)), case.device)
        peer.check(workload)
        remote = self._remote.get(peer.name)
        if remote is None or not remote.alive():
            remote = self._remote[peer.name] = Remote(partial(build, peer.name), torch.get_num_threads())
        remote.take(case)
        return remote


def build(name: str, case: Case) -> Any:
    """The provider of a peer, built from the case alone, in whichever process."""
    workload = case.build().workload
    return workload.provider(every()[name].function(workload))
