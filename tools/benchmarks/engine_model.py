"""The engine with its row work in numba: all decisions are the kernel's own.

A launch that is given no tiles takes decisions but touches no row. Between two launches, this
module does the row work on the kernel's buffers. ``test_engine.py`` shows that it leaves the same
bits there as the kernel. It can therefore replace the kernel at sizes for which the interpreter is
too slow.

Shape letters: T rows, E experts, K experts per token, S slots.
"""

from __future__ import annotations

import dataclasses

import numba as nb
import numpy as np
import torch

from megatron_maxscore.flow.device import layout
from megatron_maxscore.flow.device import rows as row_work
from megatron_maxscore.flow.engine import Solve

_F = np.float32
_U = np.uint32
_INF_BITS = 0x7F800000


@nb.njit(cache=True, inline="always")
def _mix(x):
    x = _U(x)
    x = _U((x ^ (x >> _U(16))) * _U(0x85EBCA6B))
    x = _U((x ^ (x >> _U(13))) * _U(0xC2B2AE35))
    return _U(x ^ (x >> _U(16)))


@nb.njit(cache=True, inline="always")
def _noise(spread, expert):
    h = _U((spread ^ _U(_U(expert) * _U(0x9E3779B1))) * _U(0x2C1B3C6D))
    h = _U((h ^ (h >> _U(15))) * _U(0x297A2D39))
    # Of the bits of 1.0 and above, less 1.5.
    return _F(np.int64(h >> _U(9))) * _F(2.0**-23) - _F(0.5)


@nb.njit(cache=True)
def _scan(s, base, span, grain, header, ranges, grains):
    for i in range(s.shape[0]):
        high, low, bad, forbidden = -np.inf, np.inf, False, False
        for j in range(s.shape[1]):
            v = s[i, j]
            if np.isnan(v) or v == np.inf:
                bad, v = True, _F(0.0)
                s[i, j] = v
            if v == -np.inf:
                forbidden = True
            else:
                high, low = max(high, v), min(low, v)
        span[i] = min(_F(high) - _F(low), _F(3.0e38)) if high > -np.inf else _F(0.0)
        parts, entries = 0, 0
        for v in s[i]:
            if v > -np.inf:
                above = min(_F(v - _F(low)), span[i])
                parts += np.int32(_F(_F(above / max(span[i], _F(1e-37))) * _F(65536.0)))
                entries += 1
        share = _F(_F(parts) / _F(_F(max(entries, 1)) * _F(65536.0)))
        grain[i] = _F(span[i] * min(_F(_F(3.0) * share), _F(1.0)))
        if high > -np.inf:
            base[i] = _F(_F(low) + grain[i]) if grain[i] < span[i] else high
        else:
            base[i] = _F(0.0)
        if span[i] > 0:
            ranges[span[i : i + 1].view(np.int32)[0] >> 23] += 1
        if grain[i] > 0:
            grains[grain[i : i + 1].view(np.int32)[0] >> 23] += 1
        header[_BAD] += bad
        header[_FORBIDDEN] += forbidden


_BAD, _FORBIDDEN = layout.BAD.value, layout.FORBIDDEN.value


@nb.njit(cache=True, inline="always")
def _row(s, i, base, span, grain, scales, b, eps, seed, r):
    """Write a row's reduced scores; return its grain."""
    scale, limit, typical = scales
    wide = span[i]
    factor = _F(1.0)
    if wide > limit:
        factor, wide = _F(limit / wide), limit
    width = max(wide, _F(scale * _F(0.375)))
    least = max(_F(grain[i] * factor), _F(typical * _F(0.375)))
    part = _F(eps * least)
    spread = _mix(i + seed + 1)
    for j in range(s.shape[1]):
        v = min(max(_F(s[i, j] - base[i]), _F(-3.0e38)), _F(3.0e38)) * factor
        if s[i, j] == -np.inf:
            v = -_F(_F(grain[i] * factor) + width)
        r[j] = _F(_F(v - b[j]) + _F(part * _noise(spread, j)))
    return least


@nb.njit(cache=True)
def _sweep(s, base, span, grain, scales, b, w, eps, seed, k, block, held, counts, own):
    tokens, experts = s.shape
    r, key = np.empty(experts, _F), np.empty(experts, np.int32)
    bits = r.view(np.int32)
    for i in range(tokens):
        _row(s, i, base, span, grain, scales, b, eps, seed, r)
        for j in range(experts):
            x = bits[j]
            x ^= (x >> 31) & 0x7FFFFFFF
            key[j] = (x & -block) | (block - 1 - j)
        order = np.sort(key)
        kth = order[experts - k]
        edges = np.empty(2, np.int32)
        edges[0] = kth & -block
        edges[1] = order[experts - k - 1] & -block if k < experts else 0
        edges ^= (edges >> 31) & 0x7FFFFFFF
        values = edges.view(_F)
        following = values[1] if k < experts else _F(-np.inf)
        middle = _F(_F(0.5) * _F(values[0] + following))
        for j in range(experts):
            has = key[j] >= kth
            held[i, j] = has
            a = abs(_F(r[j] - middle))
            first = 1 if has else 5
            if has:
                counts[0, j] += 1
                own[j] += 1
            counts[first, j] += a <= w[j]
            counts[first + 1, j] += a <= _F(w[j] / _F(8.0))
            counts[first + 2, j] += a <= _F(w[j] / _F(64.0))
            counts[first + 3, j] += a <= _F(w[j] / _F(512.0))


@nb.njit(cache=True)
def _offer(
    s, base, span, grain, scales, b, eps, seed, held, give, take, cost, jitter, turn, moves,
    slots, block, counts_least, keys,
):  # fmt: skip
    tokens, experts = s.shape
    r = np.empty(experts, _F)
    bits = np.empty(1, _F)
    integer = bits.view(np.int32)
    for i in range(tokens):
        least = _row(s, i, base, span, grain, scales, b, eps, seed, r)
        part, spread = _F(jitter * least), _mix(i + turn + 1)
        m, t, low, a = _F(-np.inf), -1, _F(np.inf), -1
        for j in range(experts):
            if held[i, j]:
                if give[j] > 0 and r[j] < low:
                    low, a = r[j], j
            elif take[j] > 0:
                room = _F(r[j] - cost[j])
                if jitter > 0:
                    room = _F(room + _F(part * _noise(spread, j)))
                if room > m:
                    m, t = room, j
        if t < 0:
            continue
        for j in range(experts):
            if held[i, j]:
                bits[0] = max(_F(r[j] - m), _F(0.0))
                counts_least[j] = max(counts_least[j], _INF_BITS - integer[0])
        if a < 0 or not moves:
            continue
        bits[0] = max(_F(low - m), _F(0.0))
        key = np.int64((integer[0] >> 9) ^ 0x3FFFFF) << 41 | np.int64(i ^ 0x1FFFFF) << 20
        key |= np.int64(a) << 10 | np.int64(t)
        h = _mix(i)
        at_a = (h >> _U(4)) % _U(min(max(give[a], 1), slots))
        at_t = (h >> _U(16)) % _U(min(max(take[t], 1), slots))
        keys[0, a, at_a] = max(keys[0, a, at_a], key)
        keys[1, t, at_t] = max(keys[1, t, at_t], key)


@dataclasses.dataclass
class Solved:
    """A solution by the model: (T, K) experts by index, prices, gap, numbers of phases."""

    held: np.ndarray
    prices: np.ndarray
    gap: float
    sweeps: int
    rounds: int


class Model:
    """One problem, solved phase by phase."""

    def __init__(self, scores, topk, capacity, prices=None):
        scores = torch.as_tensor(scores)
        prices = torch.zeros(scores.shape[1]) if prices is None else torch.as_tensor(prices)
        self.solve = Solve(scores[None].contiguous(), topk, prices.float(), programs=1)
        self.capacity_E = torch.as_tensor(capacity)
        self.tokens, self.experts = scores.shape
        self.seed, self.topk = 0, topk
        self.scores = scores.float().numpy().copy()
        c = self.solve.shape.constants
        self.block, self.slots = c["BLOCK_E"], c["S"]
        self.words = -(-self.block // 32)
        self.base, self.span, self.grain = np.zeros((3, self.tokens), _F)
        self.kinds: list[int] = []
        work = self.solve.work.numpy()
        first = layout.HEADER.value
        self.header = work[:first]
        counts = 3 * layout.COUNTS.value * self.block
        self.counts = work[first : first + counts].reshape(3, layout.COUNTS.value, self.block)
        self.state = work[first + counts :]
        arguments = list(self.solve.arguments)
        self.bits = arguments[4].numpy().reshape(self.tokens, self.words)
        self.keys = arguments[7].numpy().reshape(3, 2, self.block, self.slots)
        # The kernel sees no tiles, and rows are those of one program.
        arguments[10] = 0
        self.solve.arguments = tuple(arguments)

    def vector(self, number):
        """Return the (E,) values of a vector in the kernel's state."""
        first = layout.SCALARS.value + number.value * self.block
        return self.state[first : first + self.experts]

    def number(self, number):
        """Return a number in the kernel's state."""
        return int(self.state[number.value])

    @property
    def held(self):
        """Return which experts each row holds, (T, E) bool."""
        columns = np.arange(self.experts)
        return (self.bits[:, columns >> 5] >> (columns & 31)) & 1 != 0

    def keep(self, held):
        """Set which experts each row holds, (T, E) bool."""
        bit = np.zeros((self.tokens, self.words * 32), np.uint32)
        bit[:, : self.experts] = held
        bit = bit.reshape(self.tokens, self.words, 32) << np.arange(32, dtype=np.uint32)
        self.bits[:] = bit.sum(2, dtype=np.uint32).view(np.int32)

    def phase(self, n):
        """Make a phase; return its kind."""
        self.solve.launch(n, n + 1, self.capacity_E)
        kind = self.number(layout.KIND)
        self.kinds.append(kind)
        counts, keys = self.counts[n % 3], self.keys[n % 3]
        price = self.vector(layout.PRICE).view(_F)
        eps = self.state[layout.EPS.value :].view(_F)[0]
        scales = self.header[layout.SCALE.value :][:3].view(_F)
        rows = (self.scores, self.base, self.span, self.grain)
        if kind == layout.SCAN.value:
            first = layout.RANGES.value
            _scan(*rows, self.header, *self.header[first : first + 512].reshape(2, 256))
        elif kind == layout.SWEEP.value:
            held = np.zeros((self.tokens, self.experts), np.bool_)
            window = self.vector(layout.WINDOW).view(_F)
            _sweep(
                *rows, scales, price, window, eps, self.seed, self.topk, self.block, held,
                counts, counts[layout.OWN_LOAD.value],
            )  # fmt: skip
            self.keep(held)
        elif kind == layout.ROUND.value:
            self._round(counts, keys, price, eps, scales)
        return kind

    def _round(self, counts, keys, price, eps, scales):
        give, take = (self.vector(v).astype(np.int64) for v in (layout.GIVE, layout.TAKE))
        cost, moves = self.vector(layout.COST).view(_F), self.number(layout.MEASURES) == 0
        rounds, calm = self.number(layout.ROUNDS), row_work.CALM.value
        jitter = _F(0.0)
        if rounds >= calm:
            power = np.exp2(min(_F(rounds - calm) / _F(2), _F(30.0)))
            jitter = min(_F(_F(power) * eps), _F(1.0))
        _offer(
            self.scores, self.base, self.span, self.grain, scales, price, eps, self.seed,
            self.held, give, take, cost, jitter, 7919 * rounds, moves, self.slots, self.block,
            counts[layout.LEAST.value], keys,
        )  # fmt: skip

    def run(self, most=4000):
        """Run all phases but the order of dispatch."""
        n = 0
        while self.phase(n) < layout.ORDER.value:
            n += 1
            assert n < most, "endless"
        prices = self.solve.found().prices[0].numpy()
        held = self.held
        return Solved(
            held, prices.copy(), gap_of(self.scores, prices, held, self.capacity),
            self.kinds.count(layout.SWEEP.value), self.kinds.count(layout.ROUND.value),
        )  # fmt: skip

    @property
    def capacity(self):
        """Return the (E,) capacities."""
        return self.capacity_E.numpy()


def gap_of(scores, prices, held, capacity):
    """Return the relative gap in float64; every arc is allowed and no row is scaled."""
    s = scores.astype(np.float64)
    r = s - prices
    k = int(held[0].sum())
    top = np.partition(r, r.shape[1] - k, 1)[:, -k:].sum()
    idle = np.minimum(capacity, len(s)) - held.sum(0)
    gap = top - (r * held).sum() + (prices.astype(np.float64) * idle).sum()
    spans = (s.max(1) - s.min(1)).sum()
    return gap / spans if spans > 0 else (0.0 if abs(gap) < 1e-9 else np.inf)
