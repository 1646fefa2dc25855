"""`Candidates`: the cuts a site may take, what each takes, and what each is estimated to lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankwise.sizes.cut import DENSE, Cut
from rankwise.sizes.form import Form


@dataclass(frozen=True)
class Candidates:
    """One table a site. Every allocation chooses one row of each.

    Attributes:
        cuts: c of them; where the weight may stay as it is, `DENSE` is the last.
        bits: what each takes, shape `[c]`, int64.
        rungs: rows that an allocation climbs which looks at sizes alone, ascending in bits, shape `[k]`, int64.
        reach: least and most bits a weight that a search may give a group; a least of 0 leaves it to the search.
        losses: estimated loss of each, in one unit over all sites, shape `[c]`, float64; None while nothing has looked.
    """

    cuts: tuple[Cut, ...]
    bits: Tensor
    rungs: Tensor
    reach: tuple[float, float]
    losses: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the weight may stay as it is."""
        return self.cuts[-1].dense

    @property
    def stays(self) -> bool:
        """Whether the weight can only stay as it is."""
        return all(cut.dense for cut in self.cuts)

    @property
    def smallest(self) -> int:
        """The least bits of any."""
        return int(self.bits.min())

    @property
    def largest_rank(self) -> int:
        """Of all cuts that are not dense; 0 without any."""
        return max((cut.rank for cut in self.cuts if cut.rank is not None), default=0)

    def within(self, shape: tuple[int, int], beside: float) -> Candidates:
        """Without the cuts in which L R takes more than so many bits a weight `[m, n]` beside Q."""
        most = beside * shape[0] * shape[1]
        alone: dict[int, int] = {}
        for cut, bits in zip(self.cuts, self.bits.tolist(), strict=True):
            alone[cut.q_bits] = min(alone.get(cut.q_bits, bits), bits)
        rows = [i for i, cut in enumerate(self.cuts) if cut.dense or int(self.bits[i]) - alone[cut.q_bits] <= most]
        place = {row: i for i, row in enumerate(rows)}
        rungs = torch.tensor([place[row] for row in self.rungs.tolist() if row in place])
        return replace(self, cuts=tuple(self.cuts[row] for row in rows), bits=self.bits[rows], rungs=rungs)

    def with_losses(self, losses: Tensor) -> Candidates:
        """The same with estimates, shape `[c]`."""
        return replace(self, losses=losses)

    def with_ranks(self, q_bits: int) -> int:
        """Of the cuts with so many bits of Q, the largest rank; 0 without any."""
        return max((cut.rank for cut in self.cuts if cut.rank is not None and cut.q_bits == q_bits), default=0)

    @property
    def choices(self) -> tuple[int, ...]:
        """The bits of Q that occur, 0 for no Q, in order."""
        return tuple(dict.fromkeys(cut.q_bits for cut in self.cuts if not cut.dense))

    def allows(self, cut: Cut) -> bool:
        """Whether a cut made elsewhere may stand here: its bits occur, and its rank where there is but one."""
        if cut.dense:
            return True
        ranked = [each for each in self.cuts if not each.dense]
        if len({each.rank for each in ranked}) == 1:
            return cut in ranked
        return (cut.q_bits, cut.lr_bits) in {(each.q_bits, each.lr_bits) for each in ranked}


def dense_candidate(shape: tuple[int, int], form: Form) -> Candidates:
    """The table of a weight `(m, n)` that stays as it is."""
    return Candidates(
        (DENSE,), torch.tensor([form.bits(shape, DENSE)]), torch.tensor([0]), (0.0, float(form.number_bits))
    )


def low_rank_candidates(shape: tuple[int, int], form: Form, multiple: int) -> Candidates:
    """Every multiple of a rank that takes less than the matrix, and the matrix itself.

    Args:
        shape: `(m, n)`.
        form: how ranks are stored.
        multiple: ranks are multiples of this.
    """
    whole = form.bits(shape, DENSE)
    ranks = [r for r in range(multiple, min(shape) + 1, multiple) if form.bits(shape, Cut(r)) < whole]
    cuts = (*map(Cut, ranks), DENSE)
    bits = torch.tensor([form.bits(shape, cut) for cut in cuts])
    return Candidates(cuts, bits, torch.arange(len(cuts)), (0.0, float(form.number_bits)))


def coded_candidates(
    shape: tuple[int, int], form: Form, choices: Sequence[int], lr_bits: int | None, ranks: Sequence[int], most: float
) -> Candidates:
    """Every number of bits of Q with every rank beside it.

    By size alone it is the finest Q that fits, and the rank that fits beside it: a rank beside a Q is a rung while it
    takes less than the next finer Q.

    Args:
        shape: `(m, n)`.
        form: how codes are stored.
        choices: bits a weight that Q may have, ascending; 0 for no Q.
        lr_bits: bits of L and R.
        ranks: that L R may have, ascending; 0 for none.
        most: bits a weight that a search may give a group at most.
    """
    cuts: list[Cut] = []
    rungs: list[int] = []
    finer = [*choices[1:], None]
    for q_bits, above in zip(choices, finer, strict=True):
        for rank in ranks:
            if not q_bits and not rank:
                continue
            cut = Cut(rank, q_bits, lr_bits)
            if (
                above is None
                or rank == ranks[0]
                or form.bits(shape, cut) < form.bits(shape, Cut(ranks[0], above, lr_bits))
            ):
                rungs.append(len(cuts))
            cuts.append(cut)
    bits = torch.tensor([form.bits(shape, cut) for cut in cuts])
    return Candidates(tuple(cuts), bits, torch.tensor(rungs), (float(choices[0]), most))


def join(first: Candidates, *others: Candidates) -> Candidates:
    """All cuts of several tables as one; by size alone the first is climbed, and `DENSE` above it if any has it."""
    tables = (first, *others)
    pairs = [
        (cut, bits)
        for table in tables
        for cut, bits in zip(table.cuts, table.bits.tolist(), strict=True)
        if not cut.dense
    ]
    rungs = first.rungs.tolist()
    whole = [int(table.bits[-1]) for table in tables if table.whole]
    if whole:
        pairs.append((DENSE, whole[0]))
        rungs = [rung for rung in rungs if pairs[rung][1] < whole[0]] + [len(pairs) - 1]
    reach = first.reach[0], max(table.reach[1] for table in tables)
    bits = torch.tensor([bits for _, bits in pairs])
    return Candidates(tuple(cut for cut, _ in pairs), bits, torch.tensor(rungs), reach)
