// Backward pass: gradients of query, key and value through output, divergence and log-sum-exp, in
// one launch without atomics.
//
//   a = 2^(s - m) / l,  dS = a (dP + offset + slope (s - t)),  dP = dO V^T
//   dQ = scale dS K,  dK = scale dS^T Q,  dV = a^T dO
//   offset = d(lse) - dO.O - g c,  slope = g ln2
//
// with s and t in base 2, m, l and c of the row as the forward pass left them, t measured from the
// teacher's LSE, and g the gradient of the row's divergence. Some blocks own keys and stream the
// queries past them, for dK and dV; the others own queries and stream keys, for dQ. So the map is
// computed twice, but nothing is summed across blocks: the results are the same bit for bit, and a
// small problem has work for many blocks.
#pragma once

#include "stream.cuh"

namespace attn_kd::cuda {

// The numbers that dS needs to know of a query row.
enum RowNumber { kOrigin, kInverseSum, kTeacherOrigin, kSlope, kOffset, kRowNumbers };

// A tile of queries, or of keys where that is all.
template <class S>
struct QueryStage : KeyStage<S> {
  Tile<S> output;
  float numbers[kRowNumbers][S::kColumns];
};

// These numbers; zeros for one that sees no key or does not exist, but an origin so high that a is
// 0 whatever the bias.
struct RowConstants {
  float numbers[kRowNumbers] = {-kMasked};
  static_assert(kOrigin == 0);
};

// The per-row values that make the constants.
template <bool kTeacher>
struct RowInputs {
  float origin = 0, inverse_sum = 0, correction = 0, teacher_lse = 0, grad_kl = 0, grad_lse = 0;

  __device__ void read(const BackwardProblem& p, int row) {
    origin = device::read_global(p.origin + row);
    inverse_sum = device::read_global(p.inverse_sum + row);
    if (p.grad_lse) grad_lse = device::read_global(p.grad_lse + row);
    if constexpr (kTeacher) {
      correction = device::read_global(p.correction + row);
      teacher_lse = device::read_global(p.teacher_lse + row);
      grad_kl = device::read_global(p.grad_kl + row);
    }
  }

  // `delta` is dO.O.
  __device__ RowConstants constants(float delta) const {
    RowConstants c;
    if (inverse_sum == 0) return c;
    c.numbers[kOrigin] = origin;
    c.numbers[kInverseSum] = inverse_sum;
    c.numbers[kTeacherOrigin] = kLog2e * teacher_lse;
    c.numbers[kSlope] = kLn2 * grad_kl;
    c.numbers[kOffset] = grad_lse - delta - grad_kl * correction;
    return c;
  }
};

// Columns whose part of the map a warp has in registers at a time.
inline constexpr int kPartColumns = 16;

// The products of a part of the map, or of its transpose, and what they become.
template <bool kTeacher>
struct Products {
  MapPart<kPartColumns> map;          // q.k, then a
  MapPart<kPartColumns> teacher_map;  // qt.kt
  MapPart<kPartColumns> gradient;     // dO.v, then dS

  __device__ __forceinline__ void differentiate(int n, int i, const Problem& p, float bias,
                                                const float (&c)[kRowNumbers]) {
    const float s = fmaf(map[n][i], p.scale, bias) - c[kOrigin];
    const float a = device::exp2_approx(s) * c[kInverseSum];
    float grad = gradient[n][i] + c[kOffset];
    if constexpr (kTeacher) {
      const float t = fmaf(teacher_map[n][i], p.teacher_scale, bias) - c[kTeacherOrigin];
      grad = fmaf(c[kSlope], s - t, grad);
    }
    map[n][i] = a;
    gradient[n][i] = a * grad;
  }
};

// The operands of a block's own rows: Q, Qt, dO of queries; K, Kt, V of keys.
template <class S, bool kTeacher>
struct OwnRows {
  RowFragments<S> main, teacher, value;

  __device__ __forceinline__ void load(const Input& of_main, const Input& of_teacher,
                                       const Input& of_value, const BlockRows<S>& rows,
                                       const Place& place, const bool (&visible)[2]) {
    using T = typename S::Element;
    main.load(Rows<T>(of_main, rows.b, rows.h), rows.first, place, visible);
    if constexpr (kTeacher)
      teacher.load(Rows<T>(of_teacher, rows.b, rows.h), rows.first, place, visible);
    value.load(Rows<T>(of_value, rows.b, rows.h), rows.first, place, visible);
  }

  __device__ __forceinline__ void multiply(Products<kTeacher>& products, const KeyStage<S>& stage,
                                           int first_column, const Place& place) const {
    multiply_transposed(products.map, main, stage.main, first_column, place);
    if constexpr (kTeacher)
      multiply_transposed(products.teacher_map, teacher, stage.teacher, first_column, place);
    multiply_transposed(products.gradient, value, stage.value, first_column, place);
  }
};

// Adds up the sums of the warps that share rows; those of the first have them all afterwards.
template <class S>
__device__ __forceinline__ void add_column_warps(typename S::Sums& sums, QueryStage<S> (&stages)[2],
                                                 const Place& place) {
  const unsigned column_warp = place.warp / S::kRowWarps;
  Handover<S, S::kHeadDim / 2> theirs(stages, place);
  device::barrier();  // what they held is read no more
  if (column_warp > 0) {
    theirs.of(column_warp);
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 2; ++i) theirs.write(sums[i / 4][i % 4]);
  }
  device::barrier();
  if (column_warp > 0) return;
#pragma unroll
  for (int other = 1; other < S::kColumnWarps; ++other) {
    theirs.of(other);
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 2; ++i) sums[i / 4][i % 4] += theirs.read();
  }
}

// Calls work(first column) for the parts of a tile that a warp has.
template <class S, class Work>
__device__ __forceinline__ void for_each_part(const Place& place, Work&& work) {
  const int first = place.warp / S::kRowWarps * S::kWarpColumns;
#pragma unroll 1
  for (int part = 0; part < S::kWarpColumns; part += kPartColumns) work(first + part);
}

// The sum of products of two pairs of elements.
template <class T>
__device__ __forceinline__ float dot(uint32_t x, uint32_t y) {
  const auto low = [](uint32_t word) { return device::widen(T{static_cast<uint16_t>(word)}); };
  return low(x) * low(y) + low(x >> 16) * low(y >> 16);
}

// Queries, teacher queries and gradients of the output, with the constants of the rows.
template <class S, bool kTeacher>
class QueryStream {
 public:
  __device__ QueryStream(const BackwardProblem& p, const BlockRows<S>& rows, const Place& place)
      : p_(p), b_(rows.b), h_(rows.h), place_(place) {}

  // Begins to bring a tile, of the rows from `first` on.
  __device__ void begin(QueryStage<S>& stage, int first) {
    const int row = first + place_.thread / S::kChunks;
    exists_ = row < p_.problem.query_length;
    copy_chunk(stage.main, p_.problem.query, b_, h_, row, exists_, place_);
    if constexpr (kTeacher)
      copy_chunk(stage.teacher, p_.problem.teacher_query, b_, h_, row, exists_, place_);
    const bool has_grad = p_.grad_output.data;
    // Without it nothing is read, but there is an address.
    const Input& grad_output = has_grad ? p_.grad_output : p_.problem.query;
    copy_chunk(stage.value, grad_output, b_, h_, row, exists_ && has_grad, place_);
    const Input& output = has_grad ? p_.output : p_.problem.query;
    copy_chunk(stage.output, output, b_, h_, row, exists_ && has_grad, place_);
    inputs_ = {};
    const int head = device::opaque(b_) * p_.problem.heads + device::opaque(h_);
    if (exists_ && place_.thread % S::kChunks == 0)
      inputs_.read(p_, head * p_.problem.query_length + row);
  }

  // Waits for this thread's part, and makes the constants of its row of it.
  __device__ bool finish(QueryStage<S>& stage) {
    device::wait_for_copies();
    const unsigned column = place_.thread / S::kChunks, chunk = place_.thread % S::kChunks;
    const unsigned at = Tile<S>::index(column, chunk);
    const Chunk output = device::read_shared(&stage.output.chunks[at]);
    const Chunk grad = device::read_shared(&stage.value.chunks[at]);
    float delta = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) delta += dot<typename S::Element>(grad.words[i], output.words[i]);
#pragma unroll
    for (int lanes = 1; lanes < S::kChunks; lanes *= 2) delta += device::shuffle_xor(delta, lanes);
    const RowConstants c = inputs_.constants(delta);
    if (chunk == 0)
#pragma unroll
      for (int i = 0; i < kRowNumbers; ++i)
        device::write_shared(&stage.numbers[i][column], c.numbers[i]);
    return exists_;
  }

 private:
  const BackwardProblem& p_;
  const int b_, h_;
  const Place& place_;
  RowInputs<kTeacher> inputs_;
  bool exists_ = false;
};

// The constants of two columns.
template <class S>
__device__ __forceinline__ void read_constants(float (&constants)[2][kRowNumbers],
                                               const QueryStage<S>& stage, int column) {
#pragma unroll
  for (int i = 0; i < kRowNumbers; ++i) {
    const float2 both =
        device::read_shared(reinterpret_cast<const float2*>(&stage.numbers[i][column]));
    constants[0][i] = both.x;
    constants[1][i] = both.y;
  }
}

// dK and dV of a block's keys.
template <class S, bool kTeacher>
__device__ __forceinline__ void differentiate_keys(const BackwardProblem& p, int block,
                                                   QueryStage<S> (&stages)[2]) {
  const Problem& problem = p.problem;
  const Place place;
  const BlockRows<S> rows(problem, block, problem.key_length, place);
  const KeyBias bias_of(problem, rows.b, rows.h);
  const int key = rows.first + place.row;
  const float bias[2] = {bias_of(key), bias_of(key + 8)};
  const bool visible[2] = {bias[0] != kMasked, bias[1] != kMasked};
  typename S::Sums grad_key = {}, grad_value = {};
  if (device::barrier_any(visible[0] || visible[1])) {
    OwnRows<S, kTeacher> own;
    own.load(problem.key, problem.teacher_key, problem.value, rows, place, visible);
    QueryStream<S, kTeacher> queries(p, rows, place);
    sweep<S>(queries, stages, problem.query_length, [&](const QueryStage<S>& stage) {
      for_each_part<S>(place, [&](int first) {
        Products<kTeacher> products;
        own.multiply(products, stage, first, place);
#pragma unroll
        for (int n = 0; n < kPartColumns / 8; ++n) {
          float c[2][kRowNumbers];  // of the two columns of this lane
          read_constants(c, stage, first + 8 * n + 2 * place.pair);
#pragma unroll
          for (int i = 0; i < 4; ++i) products.differentiate(n, i, problem, bias[i / 2], c[i % 2]);
        }
        multiply<S>(grad_value, products.map, stage.value, first, place);
        multiply<S>(grad_key, products.gradient, stage.main, first, place);
      });
    });
  }
  add_column_warps<S>(grad_key, stages, place);
  add_column_warps<S>(grad_value, stages, place);
  if (place.warp >= S::kRowWarps) return;
  const float scale = problem.scale * kLn2;
  const float key_factor[2] = {visible[0] ? scale : 0, visible[1] ? scale : 0};
  const float value_factor[2] = {visible[0] ? 1.f : 0, visible[1] ? 1.f : 0};
  store_rows<S>(p.grad_key, rows.b, rows.h, rows.first, problem.key_length, grad_key, key_factor,
                place);
  store_rows<S>(p.grad_value, rows.b, rows.h, rows.first, problem.key_length, grad_value,
                value_factor, place);
}

// The constants of a lane's two queries, given their dO.
template <class S, bool kTeacher>
__device__ __forceinline__ void compute_constants(RowConstants (&constants)[2],
                                                  const BackwardProblem& p,
                                                  const RowFragments<S>& grad_output,
                                                  const BlockRows<S>& rows, const Place& place,
                                                  const bool (&exists)[2]) {
  using T = typename S::Element;
  RowFragments<S> output;
  output.load(Rows<T>(p.output, rows.b, rows.h), rows.first, place, exists);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float delta = 0;
#pragma unroll
    for (int k = 0; k < S::kHeadDim / 16; ++k)
#pragma unroll
      for (int half = r; half < 4; half += 2)
        delta += dot<T>(grad_output.words[k][half], output.words[k][half]);
    RowInputs<kTeacher> inputs;
    const int row = rows.first + place.row + 8 * r;
    if (exists[r]) inputs.read(p, rows.head * p.problem.query_length + row);
    constants[r] = inputs.constants(sum_of_row(delta));
  }
}

// dQ of a block's queries.
template <class S, bool kTeacher>
__device__ __forceinline__ void differentiate_queries(const BackwardProblem& p, int block,
                                                      QueryStage<S> (&stages)[2]) {
  const Problem& problem = p.problem;
  const Place place;
  const BlockRows<S> rows(problem, block, problem.query_length, place);
  const int row = rows.first + place.row;
  const bool exists[2] = {row < problem.query_length, row + 8 < problem.query_length};
  OwnRows<S, kTeacher> own;
  own.load(problem.query, problem.teacher_query, p.grad_output, rows, place, exists);
  RowConstants c[2];
  compute_constants<S, kTeacher>(c, p, own.value, rows, place, exists);
  typename S::Sums grad_query = {};
  KeyStream<S, kTeacher> keys(problem, rows.b, rows.h, place);
  sweep<S>(keys, stages, problem.key_length, [&](const KeyStage<S>& stage) {
    for_each_part<S>(place, [&](int first) {
      Products<kTeacher> products;
      own.multiply(products, stage, first, place);
#pragma unroll
      for (int n = 0; n < kPartColumns / 8; ++n) {
        const float2 bias = device::read_shared(
            reinterpret_cast<const float2*>(&stage.bias[first + 8 * n + 2 * place.pair]));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          products.differentiate(n, i, problem, i % 2 ? bias.y : bias.x, c[i / 2].numbers);
      }
      multiply<S>(grad_query, products.gradient, stage.main, first, place);
    });
  });
  add_column_warps<S>(grad_query, stages, place);
  if (place.warp >= S::kRowWarps) return;
  const float factor[2] = {problem.scale * kLn2, problem.scale * kLn2};
  store_rows<S>(p.grad_query, rows.b, rows.h, rows.first, problem.query_length, grad_query, factor,
                place);
}

// The first `key_blocks` blocks own keys, whose gradients take longer; the others own queries.
template <class S, bool kTeacher>
__global__ void __launch_bounds__(kThreads, S::kHeadDim == 32 ? 2 : 1)
    attention_kl_backward(const __grid_constant__ BackwardProblem p,
                          const __grid_constant__ int key_blocks) {
  auto& stages = device::shared_storage<QueryStage<S>[2]>();
  const int block = device::block_index();
  if (block < key_blocks)
    differentiate_keys<S, kTeacher>(p, block, stages);
  else
    differentiate_queries<S, kTeacher>(p, block - key_blocks, stages);
}

}  // namespace attn_kd::cuda
