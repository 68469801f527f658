// The layout of the structs of params.h as text, which the package compares with its own before the first call.
#pragma once
#include <cstddef>
#include <string>
#include <type_traits>

#include "params.h"

namespace dk {

struct Field {
  const char* name;
  std::size_t offset;
  bool real;
};

#define DK_FIELD(name) {#name, offsetof(S, name), std::is_same<decltype(S::name), double>::value}
// clang-format off: one field a line would fill a page.
#define DK_TOKENS(name)                                                                                      \
  {#name, offsetof(S, name.data), false}, {#name "_stride_b", offsetof(S, name.stride_b), false},            \
      {#name "_stride_h", offsetof(S, name.stride_h), false}, {#name "_stride_n", offsetof(S, name.stride_n), false}

template <class Params>
struct Layout;

template <>
struct Layout<AttentionParams> {
  using S = AttentionParams;
  static constexpr const char* name = "AttentionParams";
  static constexpr Field fields[] = {
      DK_FIELD(abi_version), DK_FIELD(batch), DK_FIELD(heads), DK_FIELD(nq), DK_FIELD(nk), DK_FIELD(head_dim),
      DK_FIELD(dtype), DK_FIELD(threads),
      DK_TOKENS(q), DK_TOKENS(k), DK_TOKENS(v), DK_TOKENS(out), DK_TOKENS(dout), DK_TOKENS(dq), DK_TOKENS(dk),
      DK_TOKENS(dv), DK_FIELD(lse), DK_FIELD(dlse), DK_FIELD(lse_stride_b), DK_FIELD(lse_stride_h),
      DK_FIELD(pos_key), DK_FIELD(pos_query), DK_FIELD(pos_key_stride_h), DK_FIELD(pos_key_stride_r),
      DK_FIELD(pos_query_stride_h), DK_FIELD(pos_query_stride_r), DK_FIELD(prepared), DK_FIELD(prepared_bytes),
      DK_FIELD(dpos_key), DK_FIELD(dpos_query), DK_FIELD(dpos_stride_h), DK_FIELD(has_pos_key), DK_FIELD(has_pos_query),
      DK_FIELD(table_rows), DK_FIELD(first_row), DK_FIELD(prefix_length),
      DK_FIELD(delta), DK_FIELD(reach), DK_FIELD(low_end), DK_FIELD(high_start), DK_FIELD(smooth),
      DK_FIELD(key_mask), DK_FIELD(query_mask), DK_FIELD(pair_mask), DK_FIELD(key_mask_stride_b),
      DK_FIELD(query_mask_stride_b), DK_FIELD(pair_mask_stride_b), DK_FIELD(pair_mask_stride_h),
      DK_FIELD(pair_mask_stride_q), DK_FIELD(cu_seqlens),
      DK_FIELD(scale), DK_FIELD(dropout_threshold), DK_FIELD(dropout_scale), DK_FIELD(seed)};
};

template <>
struct Layout<LinearParams> {
  using S = LinearParams;
  static constexpr const char* name = "LinearParams";
  static constexpr Field fields[] = {
      DK_FIELD(abi_version), DK_FIELD(tokens), DK_FIELD(in_features), DK_FIELD(out_features), DK_FIELD(dtype),
      DK_FIELD(gelu), DK_FIELD(threads), DK_FIELD(x_transposed), DK_FIELD(weight_transposed),
      DK_FIELD(x), DK_FIELD(weight), DK_FIELD(bias), DK_FIELD(out)};
};

template <>
struct Layout<DropoutParams> {
  using S = DropoutParams;
  static constexpr const char* name = "DropoutParams";
  static constexpr Field fields[] = {
      DK_FIELD(abi_version), DK_FIELD(count), DK_FIELD(threads), DK_FIELD(x_dtype), DK_FIELD(residual_dtype),
      DK_FIELD(out_dtype), DK_FIELD(x), DK_FIELD(residual), DK_FIELD(out), DK_FIELD(threshold), DK_FIELD(seed),
      DK_FIELD(scale)};
  // clang-format on
};

#undef DK_FIELD
#undef DK_TOKENS

// "Name size: field@offset ..., and an apostrophe where the field is a double."
template <class Params>
std::string described() {
  using L = Layout<Params>;
  static_assert(sizeof(L::fields) / sizeof(Field) * 8 == sizeof(Params), "each field of the struct is described");
  std::string text = std::string(L::name) + " " + std::to_string(sizeof(Params)) + ":";
  for (const Field& field : L::fields)
    text += std::string(" ") + field.name + "@" + std::to_string(field.offset) + (field.real ? "'" : "");
  return text;
}

inline const std::string& layouts() {
  static const std::string text =
      described<AttentionParams>() + "\n" + described<LinearParams>() + "\n" + described<DropoutParams>() + "\n";
  return text;
}

}  // namespace dk
