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

from deberta_kernels.impl.triton.kernels.primitives import along_columns, along_rows, difference, kept, sum_of_products


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
def position_product(x, block, PRECISION: tl.constexpr):
    """Return the product of tokens with table rows, or of table rows with tokens, float32.

    In bfloat16 it is rounded, as eager code rounds it, in every pass alike: the forward stages it in 16 bits, and a
    score that another pass forms must be the same, or the probabilities of a row add up to something other than 1. In
    float16 it could overflow where the score does not.
    """
    product = tl.dot(x, block.T, input_precision=PRECISION)
    if x.dtype == tl.bfloat16:
        product = product.to(tl.bfloat16).to(tl.float32)
    return product


@triton.jit
def near_score(
    fixed, moving, carried, fixed_block, old_block, new_block, index, old_pair, old_entry, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the raw scores of a near tile, (T, T) float32, fixed by moving tokens, and what the next tile carries on.

    Along a row of tiles the new blocks of one tile are the old ones of the next, so that one product with the fixed
    tokens and its rotation per tile suffice.

    Args:
        fixed: tokens of all tiles of this program, (T, BLOCK_D): the queries, or the keys in the pass by keys.
        moving: the other tokens.
        carried: the rotated product of the fixed tokens with the old block of their table.
        fixed_block: the new block of that table.
        old_block: of the other table.
        new_block: of the other table.
        index: y of each pair.
        old_pair: which pairs read the old blocks.
        old_entry: which entries (y, moving token) of the product with the other table are of its old block.
    """
    rotated = along_rows(position_product(fixed, fixed_block, PRECISION), index, TILE)
    old = position_product(old_block, moving, PRECISION)
    new = position_product(new_block, moving, PRECISION)
    bias = along_columns(tl.where(old_entry, old, new), index, TILE)
    bias += tl.where(old_pair, carried, rotated)
    return tl.dot(fixed, moving.T, bias, input_precision=PRECISION), rotated


@triton.jit
def lone_score(q, k, high_key, low_key, high_query, low_query, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the raw scores of a near tile, queries by keys, from all four blocks: those of `near_score` to the bit."""
    row = tl.arange(0, TILE)[:, None]
    col = tl.arange(0, TILE)[None, :]
    distance = difference(TILE)
    high = position_product(q, high_key, PRECISION)
    low = position_product(q, low_key, PRECISION)
    # Row r of the product reads entry y of the high block where y <= r, which is where r >= c.
    c2p = along_rows(tl.where(row >= col, high, low), distance, TILE)
    high = position_product(high_query, k, PRECISION)
    low = position_product(low_query, k, PRECISION)
    bias = along_columns(tl.where(row + col < TILE, high, low), distance, TILE)
    return tl.dot(q, k.T, bias + c2p, input_precision=PRECISION)


@triton.jit
def valid_keys(offs_j, first_key, last_key, key_mask, MASKED: tl.constexpr):
    """Return which keys are in [first_key, last_key) and not masked, (T,) bool."""
    # As unsigned numbers, so that one comparison does for both ends.
    valid = (offs_j - first_key).to(tl.uint32) < tl.maximum(last_key - first_key, 0).to(tl.uint32)
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
            j = j0 + tl.arange(0, TILE)
            if KEYS_FIRST:
                i = i0 + tl.arange(0, score.shape[1])
                pointers = pair_mask + j[:, None] * stride_pn + i[None, :] * stride_pm
                inside = (j < nk)[:, None] & (i < nq)[None, :]
            else:
                i = i0 + tl.arange(0, score.shape[0])
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
        keep = kept(seed_ptr, batch_head, i0, j0, threshold, KEYS_FIRST, TILE, TILE)
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
