"""Libraries in processes of their own, which time what they are asked for.

In one process they would share a heap and caches: glibc returns freed memory by what it has seen of
anybody, so that torchdeq profits from what deqsolvers lets it keep, and deqsolvers pays for what
torchdeq frees.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from benchmarks.settings import Settings
from benchmarks.timing import timed

Case = TypeVar("Case", bound=Hashable)
# Makes the functions of a library that are to be timed in a case, by name.
Functions = Callable[[str, Case, Settings], Mapping[str, Callable[[], object]]]

# The threads of whoever was asked before wait for more work, and take a core for that, so long.
_PAUSE = 0.05


class Apart:
    """One process for each of ``libraries``, until the end of a with block."""

    def __init__(self, libraries: list[str], make: Functions[Case], settings: Settings):
        """``make`` is a function of a module, so that the processes find it."""
        context = get_context("spawn")
        self._connections: dict[str, Connection] = {}
        for library in libraries:
            here, there = context.Pipe()
            arguments = (there, library, make, settings)
            context.Process(target=_serve, args=arguments, daemon=True).start()
            there.close()  # so that the end of the process is noticed here
            self._connections[library] = here

    @property
    def libraries(self) -> list[str]:
        return list(self._connections)

    def seconds(self, library: str, case: Hashable, settle: bool) -> dict[str, float]:
        """Of every function of ``library`` in ``case``, which has run once before.

        ``settle`` runs each once more right before it is timed, so that it finds its own caches.

        Raises:
            RuntimeError: the process has ended; it has written why to stderr.
        """
        connection = self._connections[library]
        time.sleep(_PAUSE)
        try:
            connection.send((case, settle))
            return connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process that times {library} has ended") from None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._connections.values():
            connection.close()  # which ends the process


def _serve(connection: Connection, library: str, make: Functions[Case], settings: Settings) -> None:
    gc.disable()
    known, functions = None, dict[str, Callable[[], object]]()
    while True:
        try:
            case, settle = connection.recv()
        except EOFError:
            return
        if case != known:
            functions = {}
            gc.collect()
            known, functions = case, dict(make(library, case, settings))
            for function in functions.values():
                function()
        found = {}
        for name, function in functions.items():
            if settle:
                function()
            found[name] = timed(function, settings.device)
        connection.send(found)
