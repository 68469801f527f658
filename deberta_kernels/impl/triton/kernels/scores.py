"""The scores of a tile and the masks on them: the one place for the forward and for every backward pass.

One tile is T queries by T keys. With x0 the distance of its first pair, the pair (r, c) has distance x0 + r - c. Let
y = (r - c) mod T: where r >= c the pair reads row x0 + y of the distance-expanded tables, elsewhere row x0 - T + y. So
the bias of a tile is a product with two blocks of T table rows, read back along diagonals: a rotation of the rows
(or columns) of the product, done by a gather through shared memory. `docs/gpu.md` derives it.

In float32 every pass forms a score from the same products in the same order, so that it comes out with the same bits.
`weights` says why.
"""

# No postponed annotations here: Triton reads the annotations of kernels as objects.

import triton
import triton.language as tl

from deberta_kernels.impl.triton.kernels.primitives import along_two_columns, along_two_rows, kept, sum_of_products


@triton.jit
def far_query(q, pos_query_row):
    """Return q + b, rounded to the dtype of q; with b the saturated row of pos_query, (BLOCK_D,) float32.

    A saturated score is (q_i + b) . k_j + q_i . a: plain attention with another query and a row constant.
    """
    return (q.to(tl.float32) + pos_query_row[None, :]).to(q.dtype)


@triton.jit
def far_constant(q, pos_key_row):
    """Return q . a, (T,) float32; see `far_query`."""
    return sum_of_products(q.to(tl.float32), pos_key_row[None, :], 1)


@triton.jit
def _product(x, block, PRECISION: tl.constexpr):
    """Return x . block, (T, T), as it is staged: rounded to the dtype of x, as eager code rounds its bias terms."""
    return tl.dot(x, block.T, input_precision=PRECISION).to(x.dtype)


@triton.jit
def near_score(
    fixed, moving, fixed_low, fixed_high, moving_low, moving_high, index, TILE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the raw scores of a near tile, (T, T) float32, fixed by moving tokens.

    Both blocks of each table are multiplied anew in each tile, though the low blocks of one are the high ones of
    the next: a product carried on from there would take 32 registers of a lane.

    Args:
        fixed: tokens of all tiles of this program, (T, BLOCK_D): the queries, or the keys in the pass by keys.
        moving: the other tokens.
        fixed_low: the low block of the table that is multiplied with `fixed`: of the distances x0 - T and up.
        fixed_high: the high block: of x0 and up.
        moving_low: of the table that is multiplied with `moving`.
        moving_high: of it.
        index: T + the distance of each pair from x0, see `slanted`.
    """
    low = _product(moving_low, moving, PRECISION)
    high = _product(moving_high, moving, PRECISION)
    bias = along_two_columns(low, high, index, TILE).to(tl.float32)
    low = _product(fixed, fixed_low, PRECISION)
    high = _product(fixed, fixed_high, PRECISION)
    bias += along_two_rows(low, high, index, TILE).to(tl.float32)
    return tl.dot(fixed, moving.T, bias, input_precision=PRECISION)


@triton.jit
def valid_keys(offs_j, first_key, last_key, key_mask, MASKED: tl.constexpr):
    """Return which keys are in [first_key, last_key) and not masked, (T,) bool."""
    valid = (offs_j >= first_key) & (offs_j < last_key)
    if MASKED:
        valid = valid & (tl.load(key_mask + offs_j, mask=valid, other=0) != 0)
    return valid


@triton.jit
def allowed(
    score, valid, partial, masks, place, i0, j0, KEYS_FIRST: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the scores of a tile with -inf where a mask or an end forbids attention.

    Args:
        score: (T, T) float32, keys by queries when KEYS_FIRST, else queries by keys.
        valid: which keys there are, (T,).
        partial: whether some are not.
        masks: see `primitives`.
        place: see `primitives`.
        i0: first query of the tile.
        j0: first key.
    """
    if partial:
        if KEYS_FIRST:
            score = tl.where(valid[:, None], score, -float("inf"))
        else:
            score = tl.where(valid[None, :], score, -float("inf"))
    if MASKED == 2:
        key_mask, tile_list, list_size, pair_mask, has_pair, stride_pm, stride_pn = masks
        nq, nk, prefix, prefix_tiles, tiles, key_start = place
        if has_pair != 0:
            i = i0 + tl.arange(0, TILE)
            j = j0 + tl.arange(0, TILE)
            if KEYS_FIRST:
                pointers = pair_mask + j[:, None] * stride_pn + i[None, :] * stride_pm
                inside = (j < nk)[:, None] & (i < nq)[None, :]
            else:
                pointers = pair_mask + i[:, None] * stride_pm + j[None, :] * stride_pn
                inside = (i < nq)[:, None] & (j < nk)[None, :]
            # As a number: the truth values of a tile cannot change their layout on AMD devices.
            limit = tl.load(pointers, mask=inside, other=0).to(tl.float32)
            score = tl.where(limit > 0, score, -float("inf"))
    return score


@triton.jit
def weights(score, shift, qk_scale, x):
    """Return the attention probabilities p before dropout, (T, T) float32.

    p is as exact as score and shift, whose last bit is coarse once scores are large: the sum of a row differs from 1 by
    |lse| * 2^-24. float32 is held to better than that. There the pass by queries, which meets all keys of a row, notes
    1 / sum, and the pass by keys multiplies by it; since both form scores with the same bits, a row with all its weight
    on one key gets exactly 1.

    Args:
        score: raw scores, -inf where forbidden.
        shift: row constant less log-sum-exp, raw, broadcast along the keys.
        qk_scale: from raw scores to units of log2.
        x: a tensor of the inputs' dtype. In float32 the shift is added before scaling, which is more exact; elsewhere
            both are one operation.
    """
    if x.dtype == tl.float32:
        return tl.exp2((score + shift) * qk_scale)
    else:
        return tl.exp2(score * qk_scale + shift * qk_scale)


@triton.jit
def after_dropout(p, dp, drop, i0, j0, keep_scale, KEYS_FIRST: tl.constexpr, DROPOUT: tl.constexpr, TILE: tl.constexpr):
    """Return p and dp with what dropout does to them, both (T, T) float32.

    Args:
        p: see `weights`; keys by queries when KEYS_FIRST, else queries by keys.
        dp: dout . v, raw.
        drop: see `primitives`.
        i0: first query of the tile.
        j0: first key.
        keep_scale: what a kept probability is multiplied by.
    """
    if DROPOUT:
        seed_ptr, batch_head, threshold = drop
        keep = kept(seed_ptr, batch_head, i0, j0, threshold, KEYS_FIRST, TILE)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        p = tl.where(keep, p * keep_scale, 0.0)
    return p, dp


@triton.jit
def score_gradient(
    p, dp, out_dot_dout, drop, i0, j0, keep_scale, KEYS_FIRST: tl.constexpr, DROPOUT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return (p after dropout, ds), ds without the factor `scale`; both (T, T) float32.

    Args:
        p: as in `after_dropout`, like the others.
        dp: as there.
        out_dot_dout: broadcast along the keys.
        drop: as there.
        i0: as there.
        j0: as there.
        keep_scale: as there.
    """
    dropped, dp = after_dropout(p, dp, drop, i0, j0, keep_scale, KEYS_FIRST, DROPOUT, TILE)
    return dropped, p * (dp - out_dot_dout)


@triton.jit
def sum_of_only_tile(p, dp, out_dot_dout, dlse, is_only):
    """Return `out_dot_dout` of each query, (T,) float32: anew where the tile at hand has all its keys.

    `out` is rounded to 16 bits. Where few keys share the weight of a query, ds is small, or 0 with one key, and so must
    be the difference that makes it: of numbers computed alike.

    Args:
        p: queries by keys, before dropout.
        dp: after dropout.
        out_dot_dout: what is known from `out`.
        dlse: gradient of lse.
        is_only: whether it has.
    """
    if is_only:
        total = tl.sum(p, 1)
        out_dot_dout = tl.sum(p * dp, 1) / tl.where(total > 0.0, total, 1.0) - dlse
    return out_dot_dout
