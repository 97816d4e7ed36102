// Sums of rows of tables, and their gradients: bound by memory alone.
//
// Forward reads a row of each table and writes the sum, with dropout, in one pass; torch makes one for each table,
// one for the scale and one for dropout. The rows of the token table lie anywhere, so the next one is asked for
// while one is summed.
//
// Backward sums, for each row of a table, the rows of grad_output that used it. They are found by a counting sort of
// the indices, so that a row of the gradient is summed in the order of the batch, in float32, by one thread, and
// written once; rows that nobody used are cleared in the same pass. Where many rows used one (a padding token, one
// of two segments), they are summed in pieces, in parallel: sums stay short, which keeps their rounding small. What
// is one piece does not depend on the number of threads, so equal inputs give equal bits.
#include "embedding.h"

#include <cstring>
#include <initializer_list>

#include "parallel.h"
#include "philox.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {
namespace {

constexpr int64_t piece_rows = 64;  // of grad_output, summed as one
constexpr int64_t task_rows = 64;   // of a table
constexpr int64_t width = 512;      // columns summed at a time, on the stack

template <class T>
inline const T* row_of(const EmbeddingTable& table, int64_t n) {
  if (!table.rows) return nullptr;
  const int64_t row = table.index ? table.index.ptr<const int64_t>()[n] : n % table.rows.shape[0];
  return table.rows.ptr<const T>() + row * table.rows.shape[1];
}

template <class T>
void forward(const EmbeddingForward& a) {
  const int64_t N = a.output.shape[0], E = a.output.shape[1];
  const Dropout dropout = Dropout::make(a.dropout_p, {a.seed, a.offset});
  const Vec scale = Vec::set1(a.tokens.scale);
  parallel_ranges(N, threads_for(N * E), [&](int64_t begin, int64_t end, int) {
    const Scratch<float> room(a.dropout_p > 0 ? E + Dropout::spare : 0);
    for (int64_t n = begin; n < end; ++n) {
      const T* token = row_of<T>(a.tokens, n);
      const T* next = n + 1 < end ? row_of<T>(a.tokens, n + 1) : token;
      const T *position = row_of<T>(a.positions, n), *segment = row_of<T>(a.segments, n);
      const float* keep = a.dropout_p > 0 ? dropout.multipliers(uint64_t(n * E), E, room.get()) : nullptr;
      T* out = a.output.ptr<T>() + n * E;
      for_vectors(E, [&](int64_t c, int m) {
        __builtin_prefetch(next + c);
        Vec sum = load(token + c, m) * scale;
        if (position) sum = sum + load(position + c, m);
        if (segment) sum = sum + load(segment + c, m);
        if (keep) sum = sum * load(keep + c, m);
        store(out + c, sum, m);
      });
    }
  });
}

// For each row of a table, which rows of the batch used it, in order; and the pieces that long lists are cut into.
class Users {
 public:
  Users(const EmbeddingTable& table, int64_t N)
      : rows_(table.rows.shape[0]), first_(rows_ + 2), piece_(rows_ + 1), list_(N) {
    int64_t *first = first_.get() + 1, *piece = piece_.get();
    std::memset(first_.get(), 0, size_t(rows_ + 2) * sizeof(int64_t));
    const auto index = [&](int64_t n) { return table.index ? table.index.ptr<const int64_t>()[n] : n % rows_; };
    for (int64_t n = 0; n < N; ++n) ++first[index(n)];
    int64_t total = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      piece[r] = pieces_;
      if (first[r] > piece_rows) pieces_ += ceil_div(first[r], piece_rows);
      const int64_t count = first[r];
      first[r] = total;
      total += count;
    }
    piece[rows_] = pieces_;
    // first[r] moves on to the end of its list, which is where the next one begins.
    for (int64_t n = 0; n < N; ++n) list_.get()[first[index(n)]++] = n;
  }

  int64_t rows() const { return rows_; }
  int64_t count(int64_t row) const { return first_.get()[row + 1] - first_.get()[row]; }
  const int64_t* of(int64_t row) const { return list_.get() + first_.get()[row]; }
  // Pieces exist of rows with more than piece_rows users; `first_piece` of any other is that of the next.
  int64_t pieces() const { return pieces_; }
  int64_t first_piece(int64_t row) const { return piece_.get()[row]; }

 private:
  int64_t rows_, pieces_ = 0;
  Scratch<int64_t> first_, piece_, list_;
};

template <class T>
class TableGradient {
 public:
  TableGradient(const EmbeddingBackward& a, const EmbeddingTable& table)
      : a_(a),
        table_(table),
        E_(table.rows.shape[1]),
        dropout_(Dropout::make(a.dropout_p, {a.seed, a.offset})),
        users_(table, a.grad_output.shape[0]),
        sums_(users_.pieces() * E_) {}

  void write() const {
    sum_pieces();
    T* out = table_.rows.template ptr<T>();
    parallel_tasks(ceil_div(users_.rows(), task_rows), [&](int64_t task) {
      const int64_t end = (task + 1) * task_rows < users_.rows() ? (task + 1) * task_rows : users_.rows();
      for (int64_t row = task * task_rows; row < end; ++row) {
        if (users_.count(row) == 0) {
          std::memset(out + row * E_, 0, size_t(E_) * sizeof(T));
        } else {
          write_row(row, out + row * E_);
        }
      }
    });
  }

 private:
  // body(column, count) for the columns, `width` at a time.
  template <class Body>
  void for_columns(const Body& body) const {
    for (int64_t c = 0; c < E_; c += width) body(c, E_ - c < width ? E_ - c : width);
  }

  // sum = the sum of columns [column, column + count) of rows `list`[0 .. rows) of grad_output.
  void sum_rows(const int64_t* list, int64_t rows, int64_t column, int64_t count, float* sum) const {
    float room[width + Dropout::spare];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = list[i] * E_ + column;
      const T* grad = a_.grad_output.template ptr<const T>() + at;
      const float* keep = a_.dropout_p > 0 ? dropout_.multipliers(uint64_t(at), count, room) : nullptr;
      for_vectors(count, [&](int64_t c, int n) {
        Vec x = load(grad + c, n);
        if (keep) x = x * load(keep + c, n);
        store(sum + c, i > 0 ? load(sum + c, n) + x : x, n);
      });
    }
  }

  void sum_pieces() const {
    if (users_.pieces() == 0) return;
    const Scratch<int64_t> row_of_piece(users_.pieces());
    for (int64_t row = 0; row < users_.rows(); ++row) {
      for (int64_t i = users_.first_piece(row); i < users_.first_piece(row + 1); ++i) row_of_piece.get()[i] = row;
    }
    parallel_tasks(users_.pieces(), [&](int64_t piece) {
      const int64_t row = row_of_piece.get()[piece], start = (piece - users_.first_piece(row)) * piece_rows;
      const int64_t left = users_.count(row) - start;
      for_columns([&](int64_t column, int64_t count) {
        float* sum = sums_.get() + piece * E_ + column;
        sum_rows(users_.of(row) + start, left < piece_rows ? left : piece_rows, column, count, sum);
      });
    });
  }

  void write_row(int64_t row, T* out) const {
    const int64_t first = users_.first_piece(row), last = users_.first_piece(row + 1);
    const Vec scale = Vec::set1(table_.scale);
    for_columns([&](int64_t column, int64_t count) {
      float sum[width];
      if (first == last) sum_rows(users_.of(row), users_.count(row), column, count, sum);
      for (int64_t piece = first; piece < last; ++piece) {
        const float* part = sums_.get() + piece * E_ + column;
        for_vectors(count, [&](int64_t c, int n) {
          store(sum + c, piece > first ? load(sum + c, n) + load(part + c, n) : load(part + c, n), n);
        });
      }
      for_vectors(count, [&](int64_t c, int n) { store(out + column + c, load(sum + c, n) * scale, n); });
    });
  }

  const EmbeddingBackward& a_;
  const EmbeddingTable& table_;
  int64_t E_;
  Dropout dropout_;
  Users users_;
  Scratch<float> sums_;
};

template <class T>
void backward(const EmbeddingBackward& a) {
  for (const EmbeddingTable* table : {&a.tokens, &a.positions, &a.segments}) {
    if (table->rows) TableGradient<T>(a, *table).write();
  }
}

}  // namespace

void embedding_fwd(const EmbeddingForward& a) {
  with_storage(a.output.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void embedding_bwd(const EmbeddingBackward& a) {
  with_storage(a.grad_output.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
