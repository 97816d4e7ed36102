// What the attention kernels are given, and how the launchers make it of the problem.
#pragma once

#include "attention.h"
#include "device.h"
#include "philox.cuh"

namespace pytransformer::cuda {

// A [B,H,T,width] tensor whose last stride is 1; strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  int width = 0;
};

// Where the rows of a head of a sequence are in such a tensor.
struct HeadPlace {
  int batch, head, before;  // rows before the sequence's

  __device__ int64_t offset(const Heads& x) const { return batch * x.batch + head * x.head + before * x.row; }
};

struct Bias {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  bool is_float32 = false;  // otherwise of the inputs' type
};

// A packed mask: 32 keys a word, and for mask_rows queries x 32 keys whether all, none or some may be seen.
// A dimension that the mask is broadcast in has stride 0 and one entry.
constexpr int mask_rows = 64;
enum MaskState : uint8_t { mask_empty, mask_partial, mask_full };

struct PackedMask {
  uint32_t* bits = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  uint8_t* states = nullptr;
  int64_t states_batch = 0, states_head = 0, states_row = 0;
};

// Which of all rows, heads of batches, and which of a row's blocks, in the order that they are started in, is block
// `index` of the grid. Where blocks differ in length, as causal ones do, the longest are started first: of `together`
// rows at a time, as many as the L2 cache holds, all first blocks, then all second ones. Row by row the long blocks of
// the last row would run alone at the end.
struct Turn {
  int row, block;

  __device__ Turn(int index, int blocks, int rows, int together) {
    const int first = index / (blocks * together) * together, inside = index - first * blocks;
    const int here = min(rows - first, together);
    row = first + inside % here;
    block = inside / here;
  }
};

struct AttentionArguments {
  Heads query, key, value;
  Bias bias;
  PackedMask mask;
  const int64_t* key_lengths = nullptr;
  const int32_t *cu_seq_q = nullptr, *cu_seq_k = nullptr;  // null unless sequences lie end to end
  bool at_end = false;                                     // the band counts from the end of a sequence
  DropoutArgument dropout;
  int B, H, group, T, S;  // `group` query heads share a key head; T and S are of the longest sequence
  int lower, upper;       // of the band; far beyond any position where it is open
  int query_rows_together, key_rows_together;  // heads whose blocks of queries, or of keys, take turns: see Turn
  float scale, softcap;
  int blocks = 0;  // of queries or of keys, where a block of threads takes one after the other

  __host__ __device__ bool shapes_scores() const { return bias.data != nullptr || softcap > 0; }

  // Of a sequence: how many queries and keys it has, and the rows before its first ones.
  __device__ int queries_in(int batch) const { return cu_seq_q == nullptr ? T : cu_seq_q[batch + 1] - cu_seq_q[batch]; }
  __device__ int keys_in(int batch) const { return cu_seq_k == nullptr ? S : cu_seq_k[batch + 1] - cu_seq_k[batch]; }
  __device__ int before_queries(int batch) const { return cu_seq_q == nullptr ? 0 : cu_seq_q[batch]; }
  __device__ int before_keys(int batch) const { return cu_seq_k == nullptr ? 0 : cu_seq_k[batch]; }

  // Where a head of a sequence begins in what lies like the queries, or like the keys.
  __device__ int64_t of_queries(const Heads& x, int batch, int head) const {
    return HeadPlace{batch, head, before_queries(batch)}.offset(x);
  }
  __device__ int64_t of_keys(const Heads& x, int batch, int head) const {
    return HeadPlace{batch, head, before_keys(batch)}.offset(x);
  }
};

// The rows of block `index`: queries of one head, or of all heads that share a key head.
template <bool Grouped>
struct BlockRows {
  int block, blocks;                  // of those of the head, or the split
  int line, batch, head, first, end;  // the head is the first of several where Grouped

  BlockRows() = default;
  template <class Arguments>
  __device__ BlockRows(const Arguments& a, int rows, int index) {
    const int group = Grouped ? a.group : 1;
    if constexpr (Grouped) {
      blocks = a.splits;
    } else {
      blocks = (a.T + rows - 1) / rows;
    }
    const Turn turn(index, blocks, a.B * a.H / group, Grouped ? 1 : a.query_rows_together);
    block = Grouped ? turn.block : blocks - 1 - turn.block;  // of causal the long rows first
    line = turn.row * group;
    batch = line / a.H;
    head = line % a.H;
    first = Grouped ? 0 : block * rows;
    end = group * a.queries_in(batch);
  }

  __device__ int member(int row, int T) const { return Grouped ? row / T : 0; }
  __device__ int query(int row, int T) const { return Grouped ? row % T : row; }
};

constexpr int band_limit = 1 << 30;

// Bytes of the packed mask of a problem; 0 without one.
int64_t packed_mask_bytes(const AttentionProblem& problem);

// Packs the mask, if there is one, into `memory`, and gathers everything else.
AttentionArguments attention_arguments(const char* name, const AttentionProblem& problem, const Launch& launch,
                                       char* memory);

// How the keys of few queries are split (attention_decode.cu): into `splits` shares of `share` keys; one share where
// the forward kernel serves the call, which it does not where keys and values lie in pages.
struct DecodeSplit {
  int64_t splits, share;
};

DecodeSplit decode_split(const AttentionProblem& problem);
int64_t attention_decode_workspace(const AttentionProblem& problem, const DecodeSplit& split);
void attention_decode(const AttentionForward& problem, const DecodeSplit& split, const Launch& launch);

// Workspaces are tensors of 4-byte elements.
inline void check_workspace(const char* name, const Launch& launch, int64_t bytes) {
  const int64_t given = launch.workspace ? launch.workspace.numel() * 4 : 0;
  if (given < bytes) fail(name, ": workspace must have ", bytes, " bytes, got ", given);
}

// The view of a [B,H,T,D] tensor whose rows are whole chunks of 16 bytes and start at multiples of these, or an error.
Heads heads(const char* name, const char* argument, const TensorView& view);

// Whether the kernels of Hopper's own instructions (attention_hopper.cuh) are in this build.
#ifdef PYTRANSFORMER_HOPPER
constexpr bool hopper_built = true;
#else
constexpr bool hopper_built = false;
#endif

// Whether they serve heads of `width` columns on this GPU. Of 32 columns half of a panel would be zeros.
inline bool hopper_serves(int64_t width) {
  return width > 32 && compute_capability() == 90;
}

// body(integral_constant<int, D>) for the narrowest compiled head width D that holds `width` columns.
template <class Body>
void by_head_width(const char* name, int64_t width, const Body& body) {
  if (width <= 32) return body(std::integral_constant<int, 32>());
  if (width <= 64) return body(std::integral_constant<int, 64>());
  if (width <= 96) return body(std::integral_constant<int, 96>());
  if (width <= 128) return body(std::integral_constant<int, 128>());
  if (width <= 192) return body(std::integral_constant<int, 192>());
  if (width <= 256) return body(std::integral_constant<int, 256>());
  fail(name, ": head dims go up to 256, got ", width);
}

}  // namespace pytransformer::cuda
