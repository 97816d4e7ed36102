// Packs bool masks for the attention kernels, and gathers the arguments of those kernels.
//
// A packed mask has one bit an element: 1/8 of the bytes, and one load serves 32 keys of a query. With it comes one
// byte for 64 queries x 32 keys: none of them visible (the kernels skip a tile of nothing else), all (they look at no
// mask), or some. Dimensions that a mask is broadcast in are packed once. Keys beyond S are hidden; queries beyond T do
// not count. The band and the lengths are not folded in: the kernels compute with them.
#include <algorithm>

#include "attention_arguments.h"
#include "device.h"

namespace pytransformer::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int pack_warps = 4;

struct PackArguments {
  const uint8_t* mask;
  int64_t batch, head, row, key;  // strides of the mask
  PackedMask packed;
  int H, T, S, words, blocks;  // sizes of the packed mask: T = 1 where one row serves all
};

// A warp packs 1024 keys of one query: lanes read neighbouring bytes, and lane i keeps word i.
__global__ void __launch_bounds__(32 * pack_warps) attention_pack_kernel(const __grid_constant__ PackArguments a) {
  const int lane = threadIdx.x % 32, groups = (a.words + 31) / 32;
  const int64_t task = int64_t(blockIdx.x) * pack_warps + threadIdx.x / 32;
  const int group = int(task % groups);
  const int64_t row = task / groups % a.T, line = task / groups / a.T, batch = line / a.H, head = line % a.H;
  if (line >= a.blocks) return;  // the whole warp
  const uint8_t* mask = a.mask + batch * a.batch + head * a.head + row * a.row;
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) {
    const int64_t key = int64_t(group * 32 + i) * 32 + lane;
    const uint32_t found = __ballot_sync(all_lanes, key < a.S && mask[key * a.key] != 0);
    if (lane == i) word = found;
  }
  const int index = group * 32 + lane;
  if (index < a.words) a.packed.bits[batch * a.packed.batch + head * a.packed.head + row * a.packed.row + index] = word;
}

// A thread takes one word of mask_rows queries: neighbouring threads read neighbouring words.
__global__ void attention_mask_states_kernel(const __grid_constant__ PackArguments a) {
  const int row_blocks = (a.T + mask_rows - 1) / mask_rows;
  const int64_t task = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int word = int(task % a.words), block = int(task / a.words % row_blocks);
  const int64_t line = task / a.words / row_blocks, batch = line / a.H, head = line % a.H;
  if (line >= a.blocks) return;
  const PackedMask& p = a.packed;
  const uint32_t* bits = p.bits + batch * p.batch + head * p.head + word;
  uint32_t some = 0, every = all_lanes;
  for (int row = block * mask_rows; row < min((block + 1) * mask_rows, a.T); ++row) {
    const uint32_t found = bits[row * p.row];
    some |= found;
    every &= found;
  }
  p.states[batch * p.states_batch + head * p.states_head + block * p.states_row + word] = some == 0 ? mask_empty
                                                                                          : every == all_lanes
                                                                                              ? mask_full
                                                                                              : mask_partial;
}

// How a mask is packed: its own sizes, 1 where it is broadcast.
struct PackedShape {
  int64_t B, H, T, words, row_blocks;

  explicit PackedShape(const TensorView& mask)
      : B(size(mask, 0)),
        H(size(mask, 1)),
        T(size(mask, 2)),
        words(ceil_div(mask.shape[3], 32)),
        row_blocks(ceil_div(T, mask_rows)) {}

  int64_t bits() const { return B * H * T * words; }
  int64_t states() const { return B * H * row_blocks * words; }

 private:
  static int64_t size(const TensorView& mask, int dim) { return mask.stride[dim] == 0 ? 1 : mask.shape[dim]; }
};

PackedMask pack(const char* name, const TensorView& mask, const Launch& launch, char* memory) {
  const PackedShape shape(mask);
  const auto stride = [](int64_t size, int64_t stride) { return size == 1 ? 0 : stride; };
  PackedMask packed;
  packed.bits = reinterpret_cast<uint32_t*>(memory);
  packed.batch = stride(shape.B, shape.H * shape.T * shape.words);
  packed.head = stride(shape.H, shape.T * shape.words);
  packed.row = stride(shape.T, shape.words);
  packed.states = reinterpret_cast<uint8_t*>(packed.bits + shape.bits());
  packed.states_batch = stride(shape.B, shape.H * shape.row_blocks * shape.words);
  packed.states_head = stride(shape.H, shape.row_blocks * shape.words);
  packed.states_row = stride(shape.T, shape.words);
  const PackArguments a{mask.ptr<const uint8_t>(),
                        mask.stride[0],
                        mask.stride[1],
                        mask.stride[2],
                        mask.stride[3],
                        packed,
                        int(shape.H),
                        int(shape.T),
                        int(mask.shape[3]),
                        int(shape.words),
                        int(shape.B * shape.H)};
  const int64_t warps = shape.B * shape.H * shape.T * ceil_div(shape.words, 32);
  start(name, mask, attention_pack_kernel, Shape{dim3(unsigned(ceil_div(warps, pack_warps))), dim3(32 * pack_warps)},
        launch, a);
  start(name, mask, attention_mask_states_kernel, Shape{dim3(unsigned(ceil_div(shape.states(), 128))), dim3(128)},
        launch, a);
  return packed;
}

// Of how many of `rows` the blocks take turns (Turn): those whose operands, `row_elements` each, stay in the L2 cache,
// of which this takes 5/8.
int rows_together(const AttentionProblem& p, int64_t rows, int64_t row_elements) {
  if (!p.mask && p.band_lower <= -band_limit && p.band_upper >= band_limit) return 1;
  const int64_t row_bytes = row_elements * size_of(p.query.dtype);
  return int(std::clamp(l2_bytes() / 8 * 5 / std::max(row_bytes, int64_t(1)), int64_t(1), std::max(rows, int64_t(1))));
}

}  // namespace

int64_t packed_mask_bytes(const AttentionProblem& problem) {
  if (!problem.mask) return 0;
  const PackedShape shape(problem.mask);
  return ceil_div(shape.bits() * 4 + shape.states(), 16) * 16;
}

Heads heads(const char* name, const char* argument, const TensorView& view) {
  bool fits = aligned(view, 16) && view.shape[3] % 8 == 0;
  for (int dim = 0; dim < 3; ++dim) fits = fits && (view.shape[dim] == 1 || view.stride[dim] % 8 == 0);
  if (!fits) fail(name, ": rows of ", argument, " must be of whole 16 bytes and start at multiples of them");
  // Of a dimension of one entry a stride may say anything, and addresses beyond the entry are formed, of copies of no
  // bytes: these must be multiples, too.
  const auto stride = [&](int dim) { return view.stride[dim] % 8 == 0 ? view.stride[dim] : 0; };
  return {view.data, stride(0), stride(1), stride(2), int(view.shape[3])};
}

AttentionArguments attention_arguments(const char* name, const AttentionProblem& p, const Launch& launch,
                                       char* memory) {
  AttentionArguments a;
  a.query = heads(name, "query", p.query);
  a.key = heads(name, "key", p.key);
  a.value = heads(name, "value", p.value);
  if (p.bias) {
    const bool is_float32 = p.bias.dtype == DType::float32;
    if (!is_float32 && p.bias.dtype != p.query.dtype)
      fail(name, ": no CUDA kernel for a bias of ", name_of(p.bias.dtype));
    a.bias = {p.bias.data, p.bias.stride[0], p.bias.stride[1], p.bias.stride[2], p.bias.stride[3], is_float32};
  }
  if (p.mask) a.mask = pack(name, p.mask, launch, memory);
  a.key_lengths = p.key_lengths.ptr<const int64_t>();
  a.cu_seq_q = p.cu_seq_q.ptr<const int32_t>();
  a.cu_seq_k = p.cu_seq_k.ptr<const int32_t>();
  a.at_end = p.at_end;
  a.dropout = dropout(p.dropout_p, launch);
  a.B = int(p.query.shape[0]);
  a.H = int(p.query.shape[1]);
  a.group = int(p.query.shape[1] / p.key.shape[1]);
  a.T = int(p.query.shape[2]);
  a.S = int(p.key_count());
  a.lower = int(std::max(p.band_lower, int64_t(-band_limit)));
  a.upper = int(std::min(p.band_upper, int64_t(band_limit)));
  a.scale = p.scale;
  a.softcap = p.softcap;
  const int64_t width = p.query.shape[3] + p.value.shape[3];
  a.query_rows_together = rows_together(p, a.B * a.H, a.S * width / a.group);
  a.key_rows_together = rows_together(p, a.B * a.H / a.group, a.T * width * a.group);
  return a;
}

}  // namespace pytransformer::cuda
