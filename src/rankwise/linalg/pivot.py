"""Independent rows of a low-rank matrix, and the map from them to the rest (an interpolative factorisation).

A product L R of rank r has r^2 redundant numbers: r independent rows p of it span its row space, so with A = (L R)_p
and T = L_rest L_p^{-1} the product is A on the rows p and T A on the rest, r (m + n - r) numbers (Zhao et al.,
"Pivoting factorization", ICML 2025). Which rows are taken decides how well conditioned T is; here no entry of T exceeds
a limit, by exchanges that each enlarge the volume of the chosen rows (Goreinov et al., 2010, "maxvol").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_ENTRY = 2.0
_MOST_EXCHANGES = 500


@dataclass(frozen=True)
class Pivoted:
    """A matrix `[m, n]` of rank r as r of its rows and the map to the others.

    Attributes:
        first: A, the rows `order[:r]`, shape `[r, n]`.
        rest: T, shape `[m - r, r]`; the rows `order[r:]` are T A.
        order: which row of the matrix each row of [A; T A] is, shape `[m]`, int64.
        largest: max |T|.
    """

    first: Tensor
    rest: Tensor
    order: Tensor
    largest: float

    def reconstruct(self) -> Tensor:
        """The matrix, shape `[m, n]`."""
        stacked = torch.cat([self.first, self.rest @ self.first])
        return torch.empty_like(stacked).index_copy_(0, self.order, stacked)


def independent_rows(left: Tensor, limit: float = LARGEST_ENTRY) -> tuple[Tensor, Tensor]:
    """Rows of a tall matrix that span its row space, and the others in terms of them.

    Args:
        left: L, shape `[m, r]` with m >= r.
        limit: largest entry of T that is left alone, above 1.

    Returns:
        `order`, shape `[m]`, the chosen rows first, both parts ascending; T, shape `[m - r, r]`, with
        L[order[r:]] = T L[order[:r]].
    """
    rank = left.shape[1]
    # Only the column space counts. An orthonormal basis of it also serves when L itself has columns that vanish.
    packed, swaps = torch.linalg.lu_factor(torch.linalg.householder_product(*torch.geqrf(left)))
    places = list(range(left.shape[0]))
    for row, other in enumerate((swaps - 1).tolist()):
        places[row], places[other] = places[other], places[row]
    upper_part = packed[:rank].tril(-1)
    # basis[order] = [L1; L2] U, so T = L2 L1^{-1}.
    rest = torch.linalg.solve_triangular(upper_part, packed[rank:], upper=False, left=False, unitriangular=True)
    del packed
    rest = rest.contiguous()
    for _ in range(_MOST_EXCHANGES if rest.numel() else 0):
        ends = torch.stack([rest.argmax(), rest.argmin()])
        # Read back together: a GPU is waited for once an exchange.
        largest, smallest = torch.stack([ends.double(), rest.view(-1)[ends].double()], 1).tolist()
        place, entry = largest if largest[1] >= -smallest[1] else smallest
        if not abs(entry) > limit:
            break
        row, column = divmod(int(place), rank)
        # Row `row` of T and pivot `column` change places: a rank-one change of T.
        replaced = rest[row].clone()
        replaced[column] -= 1
        along = rest[:, column].clone()
        along[row] += 1
        rest.addr_(along, replaced, alpha=-1 / entry)
        places[rank + row], places[column] = places[column], places[rank + row]
    order = torch.tensor(places, device=left.device)
    first, columns = order[:rank].sort()
    last, rows = order[rank:].sort()
    return torch.cat([first, last]), rest[rows[:, None], columns]


def pivot(left: Tensor, right: Tensor, limit: float = LARGEST_ENTRY) -> Pivoted:
    """L R as independent rows and the map to the rest; exact up to rounding.

    Args:
        left: L, shape `[m, r]` with r <= m.
        right: R, shape `[r, n]`.
        limit: what max |T| is brought under, unless that takes too many exchanges.
    """
    order, rest = independent_rows(left, limit)
    largest = float(torch.stack([rest.max(), -rest.min()]).max().abs()) if rest.numel() else 0.0
    return Pivoted(left[order[: left.shape[1]]] @ right, rest, order, largest)
