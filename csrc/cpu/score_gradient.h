// From scores and dout.v of one row block to probabilities and score gradients, a row at a time.
#pragma once
#include "dropout.h"
#include "score.h"
#include "weights.h"

namespace {

// Per row: probability = exp(score - shift, in log2 units of scale_log2) * factor. shift is lse in units of a score, and
// infinite for rows without probabilities, which makes all of them 0.
struct RowStatistics {
  float *shift, *factor, *out_dot_dout, *dlse;
};

template <class Word>
struct ScoreGradient {
  const Dropout& dropout;
  const float scale, scale_log2;  // of a gradient; of the scores as ScoreBlock makes them
  const RowStatistics& rows;
  float* scores;    // [row][kBlockKeys], replaced by the probabilities after dropout
  float* dscores;   // [row][kBlockKeys], dout . v, replaced by the gradient of the unscaled score
  uint16_t* draws;  // [panel][kV][kDrawsPerRow]
  float* probability_pairs;
  float *dscore_words, *dscore_pairs;

  Weights<Word> probabilities() const { return {scores, kBlockKeys, nullptr, probability_pairs, kBlockKeys}; }
  Weights<Word> gradients() const { return {dscores, kBlockKeys, dscore_words, dscore_pairs, kBlockKeys}; }

  // One row panel. `whole`: these are all the keys there are.
  void row_panel(uint64_t stream, const RowPanel& panel, int first_row, const KeyPanel* keys, int count,
                 bool whole) const {
    if (dropout.on())
      for (int i = 0; i < count; i++) draw_tile(dropout, stream, panel.row, keys[i].key, draws + i * kV * kDrawsPerRow);
    for (int lane = 0; lane < kV; lane++) {
      if (whole) refine(first_row + lane, lane, keys, count);
      gradients_of_row(first_row + lane, lane, keys, count, whole);
    }
    probabilities().round(first_row, kV, 0, count * kV);
    gradients().round(first_row, kV, 0, count * kV);
  }

 private:
  vf exponential(int row, int column) const {
    const vf x = (load(scores + row * kBlockKeys + column) - set1(rows.shift[row])) * set1(scale_log2);
    return Word::kPerWord == 1 ? exp2_nonpositive(x) : exp2_for_bfloat16(x);
  }

  vf keep_at(int lane, int i, int64_t key) const {
    return keep_factor(draws + (i * kV + lane) * kDrawsPerRow + (key & 7), dropout.threshold, dropout.scale);
  }

  // Where one block holds all keys of a row, maximum and sums are taken from what is at hand, as the forward did: `out`
  // may be rounded to 16 bits, and lse is a rounded sum. A row with all its weight on one key then gets exactly 0.
  // Leaves the exponentials in `scores`.
  void refine(int row, int lane, const KeyPanel* keys, int count) const {
    float* score = scores + row * kBlockKeys;
    if (rows.shift[row] < INFINITY) rows.shift[row] = row_maximum(score, count * kV);
    vf sums = zero(), products = zero();
    for (int i = 0; i < count; i++) {
      const vf e = exponential(row, i * kV);
      store(score + i * kV, e);
      vf dp = load(dscores + row * kBlockKeys + i * kV);
      if (dropout.on()) dp = dp * keep_at(lane, i, keys[i].key);
      sums = sums + e;
      products = fma(e, dp, products);
    }
    const float sum = reduce_add(sums);
    if (sum == 0.0f) return;  // a row without probabilities
    rows.factor[row] = 1.0f / sum;
    rows.out_dot_dout[row] = reduce_add(products) / sum;
  }

  void gradients_of_row(int row, int lane, const KeyPanel* keys, int count, bool whole) const {
    float *score = scores + row * kBlockKeys, *dscore = dscores + row * kBlockKeys;
    const vf factor = set1(rows.factor[row]), mean = set1(rows.out_dot_dout[row] - rows.dlse[row]);
    for (int i = 0; i < count; i++) {
      const vf p = (whole ? load(score + i * kV) : exponential(row, i * kV)) * factor;
      vf kept = p, dp = load(dscore + i * kV);
      if (dropout.on()) {
        const vf keep = keep_at(lane, i, keys[i].key);
        kept = kept * keep;
        dp = dp * keep;
      }
      store(score + i * kV, kept);
      store(dscore + i * kV, p * (dp - mean) * set1(scale));
    }
  }
};

}  // namespace
