"""Triton's kernels: sums over leaves found by a table of pointers, in units of powers of two.

A unit travels with every sum. Where a larger one comes, the sum so far is brought to it by a factor
that rounds nothing. Every program adds in one order, and writes a row of the table of parts.
"""

from typing import no_type_check

import triton
import triton.language as tl

_compiled = triton.jit(do_not_specialize=["n", "first", "programs", "kinds", "weights"])
"""Once for all numbers of tasks and alignments: the host may then launch it without a look at its
arguments."""


@triton.jit
@no_type_check
def _power_of_two(sizes):
    """The largest power of two that is not above each size, within a range that has inverses."""
    if sizes.dtype == tl.float64:
        bits = sizes.to(tl.int64, bitcast=True) >> 52
        unit = (tl.minimum(tl.maximum(bits, 1), 2045) << 52).to(tl.float64, bitcast=True)
    else:
        bits = sizes.to(tl.int32, bitcast=True) >> 23
        unit = (tl.minimum(tl.maximum(bits, 1), 253) << 23).to(tl.float32, bitcast=True)
    return tl.where(sizes > 0, unit, 0.0)


@triton.jit
@no_type_check
def _inverse(units):
    """1 / unit of powers of two, exactly; 1 for 0."""
    if units.dtype == tl.float64:
        bits = units.to(tl.int64, bitcast=True) >> 52
        inverse = ((2046 - bits) << 52).to(tl.float64, bitcast=True)
    else:
        bits = units.to(tl.int32, bitcast=True) >> 23
        inverse = ((254 - bits) << 23).to(tl.float32, bitcast=True)
    return tl.where(units > 0, inverse, 1.0)


@triton.jit
@no_type_check
def _tile(
    pointers, layouts, leaf, column, stop, rows, n, KIND: tl.constexpr, COLUMNS: tl.constexpr
):
    """Entries ``[rows, columns]`` of a leaf, zeros beyond its end."""
    base = tl.load(pointers + leaf).to(tl.pointer_type(KIND))
    columns = column + tl.arange(0, COLUMNS)
    row_stride, column_stride = tl.load(layouts + 3 * leaf), tl.load(layouts + 3 * leaf + 1)
    places = rows.to(tl.int64)[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(base + places, (rows < n)[:, None] & (columns < stop)[None, :], 0.0)


@triton.jit
@no_type_check
def _sizes(x, axis: tl.constexpr):
    """The largest finite absolute values."""
    sizes = tl.abs(x)
    return tl.max(tl.where(sizes < float("inf"), sizes, 0.0), axis)


@_compiled
@no_type_check
def measure(
    pointers, layouts, segments, firsts, parts, n, first, programs,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Parts: of every program its unit; then of every task unit, squared norm and row sum."""
    program = first + tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dtype = parts.dtype.element_ty
    unit = tl.zeros([1], dtype)
    units = tl.zeros([ROWS], dtype)
    squares, dots = units, units
    for segment in range(tl.load(firsts + program), tl.load(firsts + program + 1)):
        at = segments + 3 * segment
        leaf, stop = tl.load(at), tl.load(at + 2)
        for column in range(tl.load(at + 1), stop, COLUMNS):
            x = _tile(pointers, layouts, leaf, column, stop, rows, n, KIND, COLUMNS).to(dtype)
            grown = tl.maximum(units, _power_of_two(_sizes(x, 1)))
            whole = tl.maximum(unit, tl.max(grown, 0))
            kept = units * _inverse(grown)
            y = x * _inverse(grown)[:, None]
            total = tl.sum(x * _inverse(whole)[:, None], 0)
            squares = squares * kept * kept + tl.sum(y * y, 1)
            dots = dots * kept * (unit * _inverse(whole)) + tl.sum(y * total[None, :], 1)
            units, unit = grown, whole
    tl.store(parts + program + tl.arange(0, 1), unit)
    tasks = parts + programs + 3 * n * program + rows
    tl.store(tasks, units, rows < n)
    tl.store(tasks + n, squares, rows < n)
    tl.store(tasks + 2 * n, dots, rows < n)


@_compiled
@no_type_check
def finish(
    parts, ranges, values, scales, finite, n, programs, kinds,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of all programs of a group, for some of the tasks."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dtype = parts.dtype.element_ty
    scale = tl.zeros([1], dtype)
    units = tl.zeros([ROWS], dtype)
    squares, dots = units, units
    for kind in range(kinds):
        span = ranges + 2 * (kind * groups + group)
        end = tl.load(span + 1)
        for start in range(tl.load(span), end, PARTS):
            some = start + tl.arange(0, PARTS)
            mask = (some < end)[:, None] & (rows < n)[None, :]
            tasks = parts + programs + 3 * n * some[:, None] + rows[None, :]
            whole = tl.load(parts + some, some < end, 0.0)
            own = tl.load(tasks, mask, 0.0)
            largest = tl.maximum(scale, tl.max(whole, 0))
            grown = tl.maximum(units, tl.max(own, 0))
            before, now = units * _inverse(grown), own * _inverse(grown)[None, :]
            squares = squares * before * before
            squares += tl.sum(tl.load(tasks + n, mask, 0.0) * now * now, 0)
            shares = now * (whole * _inverse(largest))[:, None]
            dots = dots * before * (scale * _inverse(largest))
            dots += tl.sum(tl.load(tasks + 2 * n, mask, 0.0) * shares, 0)
            scale, units = largest, grown
    shares = units * _inverse(scale)
    at = values + group * n + rows
    step = groups * n
    tl.store(at, dots * shares, rows < n)
    tl.store(at + step, squares * shares * shares, rows < n)
    tl.store(at + 2 * step, units, rows < n)
    tl.store(at + 3 * step, tl.sqrt(squares), rows < n)
    tl.store(finite + group * n + rows, squares < float("inf"), rows < n)
    tl.store(scales + group + tl.arange(0, 1), tl.where(scale > 0, scale, 1.0))


@_compiled
@no_type_check
def measure_products(
    pointers, layouts, segments, firsts, parts, n, first, programs,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Parts: of every program the units of the tasks; then their products."""
    program = first + tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dtype = parts.dtype.element_ty
    units = tl.zeros([ROWS], dtype)
    products = tl.zeros([ROWS, ROWS], dtype)
    for segment in range(tl.load(firsts + program), tl.load(firsts + program + 1)):
        at = segments + 3 * segment
        leaf, stop = tl.load(at), tl.load(at + 2)
        for column in range(tl.load(at + 1), stop, COLUMNS):
            x = _tile(pointers, layouts, leaf, column, stop, rows, n, KIND, COLUMNS).to(dtype)
            grown = tl.maximum(units, _power_of_two(_sizes(x, 1)))
            kept = units * _inverse(grown)
            y = x * _inverse(grown)[:, None]
            products = products * kept[:, None] * kept[None, :]
            products += tl.dot(y, tl.trans(y), input_precision="ieee")
            units = grown
    tl.store(parts + program * n + rows, units, rows < n)
    places = rows[:, None] * n + rows[None, :]
    mask = (rows < n)[:, None] & (rows < n)[None, :]
    tl.store(parts + programs * n + program * n * n + places, products, mask)


@_compiled
@no_type_check
def finish_products(
    parts, ranges, scales, values, n, programs, kinds, ROWS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The products of one task, from all programs of a group."""
    group, groups, task = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    rows = tl.arange(0, ROWS)
    dtype = parts.dtype.element_ty
    units = tl.zeros([ROWS], dtype)
    unit = tl.zeros([1], dtype)
    products = units
    for kind in range(kinds):
        span = ranges + 2 * (kind * groups + group)
        end = tl.load(span + 1)
        for start in range(tl.load(span), end, PARTS):
            some = start + tl.arange(0, PARTS)
            mask = (some < end)[:, None] & (rows < n)[None, :]
            own = tl.load(parts + some * n + task, some < end, 0.0)
            others = tl.load(parts + some[:, None] * n + rows[None, :], mask, 0.0)
            largest, grown = tl.maximum(unit, tl.max(own, 0)), tl.maximum(units, tl.max(others, 0))
            shares = (own * _inverse(largest))[:, None] * (others * _inverse(grown)[None, :])
            part = parts + programs * n + some[:, None] * n * n + task * n + rows[None, :]
            products = products * (unit * _inverse(largest)) * (units * _inverse(grown))
            products += tl.sum(tl.load(part, mask, 0.0) * shares, 0)
            unit, units = largest, grown
    tl.store(values + (group * n + task) * n + rows, products, rows < n)
    tl.store(scales + group * n + task + tl.arange(0, 1), unit)


@_compiled
@no_type_check
def apply(
    pointers, layouts, segments, firsts, parts, outs, weights, n, first, programs,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The update; parts: of every program a unit, then the sum of squares."""
    program = first + tl.program_id(0)
    rows = tl.arange(0, ROWS)
    wide: tl.constexpr = tl.float64 if tl.float64 == KIND else tl.float32
    unit = tl.zeros([1], parts.dtype.element_ty)
    square = unit
    for segment in range(tl.load(firsts + program), tl.load(firsts + program + 1)):
        at = segments + 3 * segment
        leaf, stop = tl.load(at), tl.load(at + 2)
        group = tl.load(layouts + 3 * leaf + 2)
        shares = tl.load(weights + group * n + rows, rows < n, 0.0).to(wide)
        out = tl.load(outs + leaf).to(tl.pointer_type(KIND))
        for column in range(tl.load(at + 1), stop, COLUMNS):
            x = _tile(pointers, layouts, leaf, column, stop, rows, n, KIND, COLUMNS)
            update = tl.sum(x.to(wide) * shares[:, None], 0).to(KIND)
            columns = column + tl.arange(0, COLUMNS)
            tl.store(out + columns, update, columns < stop)
            values = update.to(parts.dtype.element_ty)
            grown = tl.maximum(unit, _power_of_two(_sizes(values, 0)))
            values = values * _inverse(grown)
            kept = unit * _inverse(grown)
            square = square * kept * kept + tl.sum(values * values, 0)
            unit = grown
    tl.store(parts + program + tl.arange(0, 1), unit)
    tl.store(parts + programs + program + tl.arange(0, 1), square)


@_compiled
@no_type_check
def finish_norm(parts, norm, programs, PARTS: tl.constexpr):
    unit = tl.zeros([1], parts.dtype.element_ty)
    square = unit
    for start in range(0, programs, PARTS):
        some = start + tl.arange(0, PARTS)
        own = tl.load(parts + some, some < programs, 0.0)
        grown = tl.maximum(unit, tl.max(own, 0))
        now, kept = own * _inverse(grown), unit * _inverse(grown)
        squares = tl.load(parts + programs + some, some < programs, 0.0)
        square = square * kept * kept + tl.sum(squares * now * now, 0)
        unit = grown
    tl.store(norm + tl.arange(0, 1), unit * tl.sqrt(square))
