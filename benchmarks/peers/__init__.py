"""The peers: other people's fastest way to the same result, found where they are installed and fenced off.

One file for each, of a few lines. A peer that is not here says why; one that brings a runtime of its own runs in
a process of its own (``_processes``); one that is wrong against float64 gets no time, like everyone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from pytransformer.benchmarks._case import AbsentError, Case
from pytransformer.benchmarks._device import local
from pytransformer.benchmarks._processes import Remote
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
        return tuple(name for name, peer in every().items() if peer.automatic and peer.gpu == (device == "cuda"))
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


@contextmanager
def joined(names: Sequence[str], case: Case, workload: Any) -> Iterator[tuple[dict[str, Provider], dict[str, str]]]:
    """The peers that can serve the case, as providers, and why the others cannot; ends their processes after."""
    providers: dict[str, Provider] = {}
    absent: dict[str, str] = {}
    remote: list[Remote] = []
    try:
        for name in names if workload is not None else ():
            peer = every()[name]
            if peer.why_not() is not None or not peer.adapters.keys() & {workload.op, "*"}:
                continue  # said once for the run, or of no concern to this op
            try:
                if peer.isolated:
                    remote.append(Remote(partial(build, name), case, torch.get_num_threads()))
                    providers[name] = remote[-1]
                else:
                    providers[name] = local(workload.provider(peer.function(workload)), case.device)
            except AbsentError as reason:
                absent[name] = str(reason)
            except Exception as error:  # other people's code: the row says what it raised
                absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield providers, absent
    finally:
        for each in remote:
            each.close()


def build(name: str, case: Case) -> Any:
    """The provider of a peer, built from the case alone, in whichever process."""
    workload = case.build().workload
    return workload.provider(every()[name].function(workload))
