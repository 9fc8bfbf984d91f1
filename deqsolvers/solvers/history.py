"""The last states that a solver saw, and products with them, for as few and as fast calls as go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite
from deqsolvers.workspace import Workspace

# From this width on it pays to cut a row for several cores.
_LONG = 16384
# Up to this many bytes it costs less to work on a history of zeros than to let it grow.
_SMALL = 2 * 2**20
# Above every square of a right-hand side whose products with a state do not overflow.
_CORNER = 1e306


@dataclass
class _Entries:
    """Views of the ``filled`` slots of a history whose rows are cut in ``cuts`` pieces."""

    filled: int
    cuts: int
    matrices: Tensor  # (B * cuts, filled, features / cuts)
    transposed: Tensor
    # For weights: (B, filled) or (B, cuts, filled), and the same as rows (B * cuts, 1, filled).
    room: tuple[Tensor, Tensor] | None = None


class History:
    """The last ``size`` matrices (B, features) that were pushed, in a ring (size, B, features).

    Under autograd every push makes a new buffer, since earlier ones may be saved for backward;
    otherwise it writes in place, and the views of the buffer are made once.
    """

    def __init__(self, size: int, like: Tensor, buffer: Tensor | None = None, full: bool = False):
        """``buffer`` is memory (size, B, features), fresh if not given; ``full`` tells that what it
        holds counts as entries."""
        self.size = size
        self.pushed = 0
        self._full = full
        self._in_place = may_overwrite()
        self._hold(like.new_empty(size, *like.shape) if buffer is None else buffer)

    @staticmethod
    def pair(size: int, like: Tensor, workspace: Workspace) -> tuple[History, History]:
        """Two histories in one piece of memory, since ``workspace`` keeps one.

        Small ones written in place start full of zeros.
        """
        both = workspace.history((2, size, *like.shape), like)
        full = may_overwrite() and size * like.numel() * like.element_size() <= _SMALL
        if full:
            both.zero_()
        return History(size, like, both[0], full), History(size, like, both[1], full)

    def _hold(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._cuts = _cuts(buffer[0]) if self._in_place else 1
        self._slots = buffer.unbind(0) if self._in_place else ()
        self._views: _Entries | None = None

    @property
    def filled(self) -> int:
        """How many slots hold data."""
        return self.size if self._full else min(self.pushed, self.size)

    @property
    def slot(self) -> int:
        """The slot that the next push writes."""
        return self.pushed % self.size

    @property
    def newest(self) -> int:
        """The slot that the last push wrote."""
        return (self.pushed - 1) % self.size

    @property
    def last(self) -> Tensor:
        """(B, features) what the last push wrote."""
        return self._slots[self.newest] if self._in_place else self.buffer[self.newest]

    def ages(self) -> Tensor:
        """(filled,) how many pushes ago each slot was written, 0 for the newest."""
        slots = torch.arange(self.filled, device=self.buffer.device)
        return (self.pushed - 1 - slots).remainder(self.size)

    def push(self, value: Tensor) -> None:
        """Write ``value`` over the oldest entry."""
        if torch.is_grad_enabled():
            entries = list(self.buffer[: self.filled].unbind(0))
            entries[self.slot : self.slot + 1] = [value]
            self._hold(torch.stack(entries))
        else:
            self.buffer[self.slot].copy_(value)
        self.pushed += 1

    def room(self) -> Tensor | None:
        """Where the next push writes, for ``out=``; None where a push makes a new buffer.

        A push of what was written there copies nothing.
        """
        return self._slots[self.slot] if self._in_place else None

    def push_difference(self, new: Tensor, old: Tensor) -> None:
        """Write ``new - old`` over the oldest entry, without a temporary."""
        if self._in_place:
            torch.sub(new, old, out=self._slots[self.slot])
            self.pushed += 1
        else:
            self.push(new - old)

    def dot(self, x: Tensor) -> Tensor:
        """(B, filled) float64 inner products of every entry with ``x`` (B, features)."""
        cuts = self._cuts_for(x)
        # In this order, not entries times x, the product of long rows runs at memory speed.
        products = torch.bmm(_cut(x, cuts).unsqueeze(1), self._entries(cuts).transposed)
        if cuts == 1:
            return products.squeeze(1).double()
        return products.view(x.shape[0], cuts, -1).sum(1, dtype=torch.float64)

    def combine(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, features) sum of the entries weighted by ``weights`` (B, filled)."""
        cuts = self._cuts_for(out)
        place = None if out is None else _cut(out, cuts).unsqueeze(1)
        entries = self._entries(cuts)
        total = torch.bmm(self._placed(weights, cuts), entries.matrices, out=place)
        return total.view(self.buffer.shape[1:]) if out is None else out

    def subtract_from(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` (B, features) less the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, -1, out)

    def add_to(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` (B, features) plus the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, 1, out)

    def _add(self, x: Tensor, weights: Tensor, sign: int, out: Tensor | None) -> Tensor:
        cuts = self._cuts_for(x, out)
        place = None if out is None else _cut(out, cuts).unsqueeze(1)
        total = torch.baddbmm(
            _cut(x, cuts).unsqueeze(1),
            self._placed(weights, cuts),
            self._entries(cuts).matrices,
            alpha=sign,
            out=place,
        )
        if out is not None:
            return out
        return total.squeeze(1) if cuts == 1 else total.view(x.shape)

    def _cuts_for(self, *matrices: Tensor | None) -> int:
        if self._cuts == 1 or all(one is None or one.is_contiguous() for one in matrices):
            return self._cuts
        return 1  # rows that lie across memory cannot be cut by a view

    def _entries(self, cuts: int) -> _Entries:
        """What is stored, as a batch of matrices."""
        filled = self.filled
        if self._views is None or self._views.filled != filled or self._views.cuts != cuts:
            matrices = _cut(self.buffer[:filled], cuts).transpose(0, 1)
            views = _Entries(filled, cuts, matrices, matrices.mT)
            if not self._in_place:
                return views
            self._views = views
        return self._views

    def _placed(self, weights: Tensor, cuts: int) -> Tensor:
        """``weights`` (B, filled) as one row (B * cuts, 1, filled) for every matrix."""
        if not self._in_place or not may_overwrite():
            weights = weights.to(self.buffer.dtype)
            weights = weights if cuts == 1 else weights.repeat_interleave(cuts, dim=0)
            return weights.unsqueeze(1)
        entries = self._entries(cuts)
        if entries.room is None:  # once, as conversion and copy are one call then
            rows = self.buffer.new_empty(weights.shape[0] * cuts, 1, entries.filled)
            shape = (-1, entries.filled) if cuts == 1 else (-1, cuts, entries.filled)
            entries.room = rows.view(shape), rows
        target, rows = entries.room
        target.copy_(weights if cuts == 1 else weights.unsqueeze(1))
        return rows

    def take(self, rows: Tensor) -> None:
        """Keep only these samples."""
        self._hold(self.buffer[:, rows])


@dataclass
class _System:
    """Views of a `Gram` in place, with the right-hand side as one row more."""

    bordered: Tensor  # (B, filled + 1, filled + 1)
    right: Tensor  # (B, filled) its last row
    factor: Tensor  # (B, filled + 1, filled + 1) its Cholesky factor
    upper: Tensor  # (B, filled, filled) the transposed factor of the matrix alone
    halfway: Tensor  # (B, filled, 1) right-hand side after the first of two substitutions
    info: Tensor  # (B,) int32


class Gram:
    """Products of the entries of a `History` with each other, a matrix a sample.

    Under autograd every write makes a new matrix, since the earlier one may be saved for backward.
    """

    def __init__(self, size: int, like: Tensor):
        shape = like.shape[0], size + 1, size + 1  # with room for a right-hand side
        self.matrix = like.new_zeros(shape, dtype=torch.float64)
        self.matrix.diagonal(dim1=1, dim2=2).fill_(1)  # an entry of zeros is to make no difference
        self._in_place = may_overwrite()
        self._hold(0)

    def _hold(self, filled: int) -> None:
        self.filled = self.matrix[:, :filled, :filled]  # (B, filled, filled) of it
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._system: _System | None = None

    def write(self, slot: int, row: Tensor, column: Tensor, diagonal: Tensor) -> None:
        """Replace row and column ``slot``, both (B, filled), and their common entry (B,)."""
        filled = row.shape[1]
        if not self._in_place:
            matrix = self.matrix.clone()
            # One view after the other: a transform of torch.func allows no write through a view
            # that was made before another write.
            matrix[:, slot, :filled] = row
            matrix[:, :filled, slot] = column
            matrix[:, slot, slot] = diagonal
            self.matrix, self.filled = matrix, matrix[:, :filled, :filled]
            return
        if self.filled.shape[1] != filled:
            self._hold(filled)
        views = self._views.get(slot)
        if views is None:
            views = self.filled[:, slot], self.filled[:, :, slot], self.filled[:, slot, slot]
            self._views[slot] = views
        views[0].copy_(row)
        views[1].copy_(column)
        views[2].copy_(diagonal)

    def solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Solve ``filled x = right`` (B, filled).

        Returns x (B, filled), and (B,) int32, nonzero where ``filled`` is not positive definite or
        x is not finite.
        """
        if not self._in_place:
            return solve_positive(self.filled, right)
        system = self._system = self._system or self._bordered()
        system.right.copy_(right)
        # The last row of the factor is the right-hand side after the first substitution, and the
        # last pivot tells whether it is finite: one call does the work of three.
        torch.linalg.cholesky_ex(system.bordered, out=(system.factor, system.info))
        x = torch.linalg.solve_triangular(system.upper, system.halfway, upper=True)
        return x.squeeze(2), system.info

    def _bordered(self) -> _System:
        batch, filled = self.filled.shape[:2]
        bordered = self.matrix[:, : filled + 1, : filled + 1]
        bordered[:, filled, filled] = _CORNER
        factor = torch.empty_like(bordered, memory_format=torch.contiguous_format).mT
        return _System(
            bordered,
            bordered[:, filled, :filled],
            factor,
            factor[:, :filled, :filled].mT,
            factor[:, filled, :filled].unsqueeze(2),
            torch.empty(batch, dtype=torch.int32, device=bordered.device),
        )

    def take(self, rows: Tensor) -> None:
        """Keep only these samples."""
        self.matrix = self.matrix[rows]
        self._hold(self.filled.shape[1])


def solve_positive(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`Gram.solve` for ``matrix`` (B, n, n) and ``right`` (B, n), through Cholesky's factor."""
    if not torch.is_grad_enabled():
        return _cholesky(matrix, right)
    # The gradient of what nobody uses is zero, and zero times the inverse of a singular system, or
    # of the pivot of a column of zeros, may be NaN. Neither must be in what is differentiated.
    with torch.no_grad():
        info = _cholesky(matrix, right)[1]
        pivots = matrix.diagonal(dim1=1, dim2=2)
        used = (pivots > torch.finfo(matrix.dtype).tiny) & (info == 0).unsqueeze(1)
        both = used.unsqueeze(1) & used.unsqueeze(2)
        unused = (~used).to(matrix.dtype).diag_embed()
    matrix, right = torch.where(both, matrix, unused), torch.where(used, right, 0.0)
    return _cholesky(matrix, right)[0], info


def _cholesky(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    x = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    return x, torch.where(torch.isfinite(x).all(1), info, 1)


def row_norms(x: Tensor) -> Tensor:
    """(B,) Euclidean norms of the rows of ``x`` (B, features)."""
    if x.shape[1] < _LONG or not may_overwrite() or not x.is_contiguous():
        return torch.linalg.vector_norm(x, dim=1)
    cuts = _cuts(x)
    if cuts == 1:
        return torch.linalg.vector_norm(x, dim=1)
    parts = torch.linalg.vector_norm(_cut(x, cuts), dim=1)
    return torch.linalg.vector_norm(parts.view(-1, cuts), dim=1)


def _cuts(x: Tensor) -> int:
    """How many pieces each row of ``x`` (B, features) is worked on in.

    On a CPU a batched product gives each core whole samples; where there are fewer samples than
    cores, and rows are long, they are cut.
    """
    batch, features = x.shape
    if features < _LONG or batch == 0 or not x.is_cpu:
        return 1
    threads = torch.get_num_threads()
    if batch >= threads:
        return 1
    cuts = -(-threads // batch)
    return cuts if features % cuts == 0 else 1


def _cut(x: Tensor, cuts: int) -> Tensor:
    """(..., B * cuts, features / cuts) view of ``x`` (..., B, features)."""
    return x if cuts == 1 else x.view(*x.shape[:-2], -1, x.shape[-1] // cuts)
