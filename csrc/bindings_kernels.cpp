// Kernels and encoder as Python sees them, for conversion, tests and benchmarks. The engine itself calls them in C++.
#include "bindings.h"
#include "encode.h"
#include "feedback.h"
#include "rotate.h"
#include "kernels.h"
#include "reader.h"
#include "sampling.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <sys/mman.h>
#include <thread>

using namespace d2moe;

namespace {

using Shape = std::vector<size_t>;

std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t n : shape) s += (s.size() > 1 ? ", " : "") + std::to_string(n);
  return s + "]";
}

template <class A> Shape shape_of(const A& a) {
  Shape s;
  for (size_t i = 0; i < a.ndim(); ++i) s.push_back(size_t(a.shape(i)));
  return s;
}

template <class A> void expect_shape(const A& a, const Shape& wanted, const char* name) {
  expect(shape_of(a) == wanted, std::string(name) + " has shape " + text(shape_of(a)) + ", expected " + text(wanted));
}

void expect_group(int group) {
  expect(group > 0 && group % 32 == 0 && group <= 256, "group is " + std::to_string(group) + ", expected a multiple of 32 up to 256");
}

void expect_threads(int threads) {
  expect(threads > 0 && threads <= 1024, "threads is " + std::to_string(threads) + ", expected 1 to 1024");
}

// Fresh memory: huge pages where large, because 4 KiB pages cost a third of the bandwidth.
template <class T> Out<T> fresh(const Shape& shape) {
  size_t bytes = sizeof(T);
  for (size_t n : shape) bytes *= n;
  const size_t align = bytes >= (8u << 20) ? 2u << 20 : 64;
  void* data = std::aligned_alloc(align, std::max(size_t(round_up(int64_t(bytes), int64_t(align))), align));
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (align > 64) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return Out<T>(static_cast<T*>(data), shape.size(), shape.data(), nb::capsule(data, [](void* p) noexcept { std::free(p); }));
}

const KernelTable& table_of(const std::string& name) {
  const KernelTable* t = kernel_table(name.c_str());
  expect(t != nullptr, "kernel table \"" + name + "\" is not built or not supported by this CPU; tables() lists what is");
  return *t;
}

// f(begin, end) on `threads` pieces of [0, n), this thread takes the first.
template <class F> void split(int64_t n, int threads, F&& f) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, n));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(f, n * i / count, n * (i + 1) / count);
  f(int64_t(0), n / count);
  for (std::thread& t : others) t.join();
}

std::vector<std::string> tables() {
  std::vector<std::string> names;
  for (const char* name : kTableNames)
    if (kernel_table(name)) names.emplace_back(name);
  return names;
}

auto encode(In<float> w, int group, int threads) {
  expect_group(group);
  expect_threads(threads);
  expect(w.ndim() == 2 && w.size() > 0, "w has shape " + text(shape_of(w)) + ", expected [rows, cols], not empty");
  const MatrixShape s{int64_t(w.shape(0)), int64_t(w.shape(1)), group};
  auto tiles = fresh<uint8_t>({size_t(s.tiles()), size_t(s.groups()), size_t(group / 4), kRegisterBytes});
  auto affine = fresh<uint8_t>({size_t(s.tiles()), size_t(s.groups()), 2, kTileRows});
  auto row_scale = fresh<float>({size_t(s.tiles()), kTileRows});
  const float* in = w.data();
  uint8_t *codes = tiles.data(), *scales = affine.data();
  float* rows = row_scale.data();
  {
    nb::gil_scoped_release free;
    split(s.tiles(), threads, [=](int64_t a, int64_t b) { encode_rows(in, s.rows, s.cols, s.group, a, b, codes, scales, rows); });
  }
  return std::make_tuple(tiles, affine, row_scale);
}

auto pack(In<uint8_t> tiles) {
  expect(tiles.ndim() == 4 && tiles.shape(2) % 8 == 0 && tiles.shape(3) == kRegisterBytes,
         "tiles has shape " + text(shape_of(tiles)) + ", expected [tiles, groups, group/4, 64]");
  Shape shape = shape_of(tiles);
  shape[2] /= 4;
  auto base = fresh<uint8_t>(shape);
  shape[2] /= 2;
  std::vector<Out<uint8_t>> planes;
  uint8_t* pointers[kPlanes];
  for (int p = 0; p < kPlanes; ++p) {
    planes.push_back(fresh<uint8_t>(shape));
    pointers[p] = planes.back().data();
  }
  const uint8_t* in = tiles.data();
  const int64_t units = int64_t(tiles.size()) / (8 * kRegisterBytes);
  uint8_t* out = base.data();
  {
    nb::gil_scoped_release free;
    pack_units(in, 0, units, out, pointers);
  }
  return std::make_tuple(base, planes);
}

// t is changed in place.
template <class T, size_t N> using InOut = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void descend(In<float> w, InOut<float, 3> e, In<float> r, In<float> gram, In<float> step, In<float> zero, InOut<uint8_t, 2> codes,
             InOut<float, 2> losses, const std::vector<int>& bits, const std::vector<float>& weights, bool fresh, int passes, int threads) {
  expect_threads(threads);
  const size_t count = e.shape(0), cols = e.shape(1), rows = e.shape(2);
  expect(count == bits.size() && count == weights.size() && count > 0 && count <= kMaxTargets,
         "e, bits and weights are of " + std::to_string(count) + ", " + std::to_string(bits.size()) + " and " +
             std::to_string(weights.size()) + " targets, expected as many of each, 1 to 7");
  expect(cols > 0 && rows % kTileRows == 0, "e has shape " + text(shape_of(e)) + ", expected [targets, cols, rows], rows a multiple of 16");
  expect(passes >= 1, "passes is " + std::to_string(passes) + ", expected at least 1");
  expect_shape(r, {count, cols, rows}, "r");
  expect_shape(gram, {cols, cols}, "gram");
  expect_shape(losses, {count, rows}, "losses");
  expect_shape(w, {cols, rows}, "w");
  expect_shape(step, {cols, rows}, "step");
  expect_shape(zero, {cols, rows}, "zero");
  expect_shape(codes, {cols, rows}, "codes");
  Targets targets{int(count), {}, {}};
  for (size_t k = 0; k < count; ++k) {
    expect(bits[k] >= (k ? bits[k - 1] + 1 : kBaseBits) && bits[k] <= kMaxBits, "bits are not ascending from 2 to 8");
    targets.bits[k] = bits[k];
    targets.weight[k] = weights[k];
  }
  expect(bits.back() == kMaxBits, "the last of bits is " + std::to_string(bits.back()) + ", expected 8");
  nb::gil_scoped_release free;
  split(int64_t(rows / kTileRows), threads, [&](int64_t a, int64_t b) {
    descend_rows(targets, w.data(), e.data(), r.data(), gram.data(), step.data(), zero.data(), int64_t(cols), int64_t(rows),
                 a * kTileRows, b * kTileRows, fresh, passes, codes.data(), losses.data());
  });
}

auto quantize_activations(const std::string& table, In<float> x, int group) {
  const KernelTable& k = table_of(table);
  expect_group(group);
  expect(x.ndim() == 2 && x.shape(1) > 0, "x has shape " + text(shape_of(x)) + ", expected [m, cols]");
  const size_t m = x.shape(0), cols = x.shape(1), groups = (cols + size_t(group) - 1) / size_t(group);
  auto q = fresh<int8_t>({m, groups * size_t(group)});
  auto scale = fresh<float>({m, groups});
  auto sum = fresh<int32_t>({m, groups});
  {
    nb::gil_scoped_release free;
    for (size_t i = 0; i < m; ++i)
      k.quantize(x.data() + i * cols, int64_t(cols), group, q.data() + i * groups * size_t(group), scale.data() + i * groups, sum.data() + i * groups);
  }
  return std::make_tuple(q, scale, sum);
}

// x f32 [m, cols] in spans of `span` columns.
Out<float> rotated(In<float> x, int span) {
  expect(x.ndim() == 2, "x has shape " + text(shape_of(x)) + ", expected [m, cols]");
  expect(span >= 16 && (span & (span - 1)) == 0, "span is " + std::to_string(span) + ", expected a power of two from 16 on");
  const size_t m = x.shape(0), cols = x.shape(1);
  auto y = fresh<float>({m, cols});
  nb::gil_scoped_release free;
  std::copy_n(x.data(), m * cols, y.data());
  for (size_t i = 0; i < m; ++i) rotate(y.data() + i * cols, int64_t(cols), span);
  return y;
}

// y f32 [m, rows]; at least bits - 2 planes.
Out<float> matmul(const std::string& table, int64_t rows, int64_t cols, int group, int bits, In<float> row_scale,
                  In<uint8_t> affine, In<uint8_t> base, std::vector<In<uint8_t>> planes, In<int8_t> q, In<float> scale,
                  In<int32_t> sum, int threads) {
  const KernelTable& k = table_of(table);
  expect_group(group);
  expect_threads(threads);
  expect(rows > 0 && cols > 0, "rows and cols must be positive");
  expect(bits >= kBaseBits && bits <= kMaxBits, "bits is " + std::to_string(bits) + ", expected 2 to 8");
  Matrix w;
  w.shape = {rows, cols, group};
  const size_t tiles = size_t(w.shape.tiles()), groups = size_t(w.shape.groups()), per = size_t(group);
  expect_shape(row_scale, {tiles, kTileRows}, "row_scale");
  expect_shape(affine, {tiles, groups, 2, kTileRows}, "affine");
  expect_shape(base, {tiles, groups, per / 16, kRegisterBytes}, "base");
  expect(planes.size() >= size_t(bits - kBaseBits) && planes.size() <= kPlanes,
         std::to_string(planes.size()) + " planes given, " + std::to_string(bits) + " bits need " + std::to_string(bits - kBaseBits) + " to 6");
  w.row_scale = row_scale.data();
  w.affine = affine.data();
  w.base = base.data();
  for (size_t p = 0; p < planes.size(); ++p) {
    expect_shape(planes[p], {tiles, groups, per / 32, kRegisterBytes}, "plane");
    w.planes[p] = planes[p].data();
  }
  expect(q.ndim() == 2, "q is [m, padded cols]");
  const size_t m = q.shape(0);
  expect_shape(q, {m, groups * per}, "q");
  expect_shape(scale, {m, groups}, "scale");
  expect_shape(sum, {m, groups}, "sum");
  auto y = fresh<float>({m, size_t(rows)});
  const Activations x{q.data(), scale.data(), sum.data(), int64_t(m)};
  float* out = y.data();
  {
    nb::gil_scoped_release free;
    if (m) split(w.shape.tiles(), threads, [&](int64_t a, int64_t b) { k.matmul(w, bits, x, a, b, out, rows); });
  }
  return y;
}

// Scores f32 [n, 16 * tiles] of queries against tiles of keys: u16 [tiles, head_dim, 16] (halves) with q f32 [n, head_dim],
// or u8 [tiles, head_dim/4, 16, 4] with key_scale f32 [tiles, 16] and q int8.
Out<float> scores(const std::string& table, nb::object keys, nb::object q, std::optional<In<float>> key_scale) {
  const KernelTable& k = table_of(table);
  const auto queries = [&](const auto& array) {
    expect(array.ndim() == 2 && array.shape(0) >= 1 && array.shape(0) <= kQueries, "q is [1 to 8 queries, head_dim]");
    return array.shape(0);
  };
  if (key_scale) {
    const auto codes = nb::cast<In<uint8_t>>(keys);
    const auto x = nb::cast<In<int8_t>>(q);
    const size_t n = queries(x), head_dim = x.shape(1), tiles = codes.shape(0);
    expect(head_dim % 4 == 0, "head_dim is " + std::to_string(head_dim) + ", expected a multiple of 4 with 8-bit keys");
    expect_shape(codes, {tiles, head_dim / 4, kKeyTile, 4}, "keys");
    expect_shape(*key_scale, {tiles, kKeyTile}, "key_scale");
    auto out = fresh<float>({n, tiles * kKeyTile});
    k.scores_q8(codes.data(), key_scale->data(), int64_t(tiles), int64_t(head_dim), x.data(), int64_t(head_dim), int64_t(n),
                {out.data(), int64_t(tiles) * kKeyTile});
    return out;
  }
  const auto halves = nb::cast<In<uint16_t>>(keys);
  const auto x = nb::cast<In<float>>(q);
  const size_t n = queries(x), head_dim = x.shape(1), tiles = halves.shape(0);
  expect_shape(halves, {tiles, head_dim, kKeyTile}, "keys");
  auto out = fresh<float>({n, tiles * kKeyTile});
  k.scores_f16(halves.data(), int64_t(tiles), int64_t(head_dim), {x.data(), int64_t(head_dim)}, int64_t(n),
               {out.data(), int64_t(tiles) * kKeyTile});
  return out;
}

// out f32 [n, head_dim] plus the values u16 (halves) or int8 with value_scale f32 [count], [count, head_dim], weighed by
// p f32 [n, count].
Out<float> mix(const std::string& table, nb::object values, In<float> p, In<float> out, std::optional<In<float>> value_scale) {
  const KernelTable& k = table_of(table);
  expect(p.ndim() == 2 && p.shape(0) >= 1 && p.shape(0) <= kQueries, "p is [1 to 8 queries, count]");
  expect(out.ndim() == 2, "out is [n, head_dim]");
  const size_t n = p.shape(0), count = p.shape(1), head_dim = out.shape(1);
  expect_shape(out, {n, head_dim}, "out");
  auto y = fresh<float>({n, head_dim});
  std::memcpy(y.data(), out.data(), n * head_dim * sizeof(float));
  const ConstRows weights{p.data(), int64_t(count)};
  const Rows rows{y.data(), int64_t(head_dim)};
  if (value_scale) {
    const auto codes = nb::cast<In<int8_t>>(values);
    expect_shape(codes, {count, head_dim}, "values");
    expect_shape(*value_scale, {count}, "value_scale");
    k.mix_q8(codes.data(), value_scale->data(), int64_t(count), int64_t(head_dim), weights, int64_t(n), rows);
  } else {
    const auto halves = nb::cast<In<uint16_t>>(values);
    expect_shape(halves, {count, head_dim}, "values");
    k.mix_f16(halves.data(), int64_t(count), int64_t(head_dim), weights, int64_t(n), rows);
  }
  return y;
}

// One of the small slots, on copies; answers (array or None, number): dot_f32(a, b), sum_squares(a), exp_sum(a,
// offset), silu_mul(gate=a, up=b), to_f16(a), to_f32(a: uint16, the bits of float16).
nb::object vector_op(const std::string& table, const std::string& op, nb::object a, nb::object b, float offset) {
  const KernelTable& k = table_of(table);
  const auto floats = [&](const nb::object& o, const char* name) {
    In<float> array;
    expect(nb::try_cast(o, array, false) && array.ndim() == 1, op + ": " + name + " must be float32 [n], contiguous");
    return array;
  };
  const auto same = [&](size_t x, size_t y) { expect(x == y, op + ": a and b differ in length"); };
  const auto answer = [](const auto& array, float number) { return nb::cast(std::make_tuple(array, number)); };
  const auto only = [](float number) { return nb::cast(std::make_tuple(nb::none(), number)); };
  if (op == "to_f32") {
    In<uint16_t> x;
    expect(nb::try_cast(a, x, false) && x.ndim() == 1, op + ": a must be uint16 [n] (the bits of float16), contiguous");
    auto y = fresh<float>({x.size()});
    k.to_f32(x.data(), y.data(), int64_t(x.size()));
    return answer(y, 0.0f);
  }
  const auto x = floats(a, "a");
  const int64_t n = int64_t(x.size());
  if (op == "sum_squares") return only(k.sum_squares(x.data(), n));
  if (op == "dot_f32") {
    const auto y = floats(b, "b");
    same(x.size(), y.size());
    return only(k.dot_f32(x.data(), y.data(), n));
  }
  if (op == "to_f16") {
    auto y = fresh<uint16_t>({x.size()});
    k.to_f16(x.data(), y.data(), n);
    return answer(y, 0.0f);
  }
  auto y = fresh<float>({x.size()});
  if (n) std::memcpy(y.data(), x.data(), size_t(n) * sizeof(float));
  if (op == "exp_sum") {
    const float sum = k.exp_sum(y.data(), offset, n);
    return answer(y, sum);
  }
  expect(op == "silu_mul", "vector op \"" + op + "\" does not exist");
  const auto up = floats(b, "b");
  same(x.size(), up.size());
  k.silu_mul(y.data(), up.data(), n);
  return answer(y, 0.0f);
}

std::atomic<int64_t> drawing_ns{0};

int64_t draw_token(In<float> logits, double temperature, int64_t top_k, double top_p, double min_p, double uniform) {
  expect(logits.ndim() == 1 && logits.size() > 0, "logits is float32 [vocab]");
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  const int64_t token = draw(*best_kernel_table(), logits.data(), int64_t(logits.size()), {temperature, top_k, top_p, min_p}, uniform);
  drawing_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  return token;
}

// Bytes per second that `threads` threads read, each over and over its own part of n_bytes, for `seconds` or one pass.
double read_bandwidth(int64_t n_bytes, int threads, double seconds, const std::optional<std::string>& table) {
  using Clock = std::chrono::steady_clock;
  const KernelTable& k = table ? table_of(*table) : *best_kernel_table();
  expect_threads(threads);
  expect(n_bytes >= int64_t(threads) << 20 && seconds >= 0, "read at least one MiB a thread for 0 or more seconds");
  const int64_t piece = 1 << 20, pieces = n_bytes / piece;
  auto memory = fresh<uint8_t>({size_t(pieces * piece)});
  uint8_t* data = memory.data();
  std::atomic<uint64_t> seen{0}; // keeps the reads from being optimised away
  std::atomic<int64_t> read{0};
  double took = 0.0;
  {
    nb::gil_scoped_release free;
    std::memset(data, 1, size_t(pieces * piece));
    const auto start = Clock::now();
    split(pieces, threads, [&](int64_t a, int64_t b) {
      uint64_t mixed = 0;
      int64_t done = 0;
      do {
        for (int64_t i = a; i < b; ++i) mixed ^= k.read_bytes(data + i * piece, piece);
        done += (b - a) * piece;
      } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
      seen ^= mixed;
      read += done;
    });
    took = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return double(read.load()) / took;
}

} // namespace

void bind_kernels(nb::module_& m) {
  m.def("tables", &tables, "Names of the kernel tables that this build has and this CPU can run.");
  m.def("encode", &encode, "w"_a, "group"_a, "threads"_a = 1,
        "Codes uint8 [tiles, groups, group/4, 64], affine uint8 [tiles, groups, 2, 16] and row scale float32 [tiles, 16] of w float32 [rows, cols].");
  m.def("descend", &descend, "w"_a, "e"_a.noconvert(), "r"_a, "gram"_a, "step"_a, "zero"_a, "codes"_a.noconvert(),
        "losses"_a.noconvert(), "bits"_a, "weights"_a, "fresh"_a, "passes"_a, "threads"_a = 1,
        "Codes of some columns, in place, and what they change in errors and losses; see d2moe.convert.feedback.");
  m.def("pack", &pack, "tiles"_a, "Base plane and the six one-bit planes of register-ordered codes.");
  m.def("rotate", &rotated, "x"_a, "span"_a, "Walsh-Hadamard transforms of whole spans of columns; see d2moe.planes.");
  m.def("quantize_activations", &quantize_activations, "table"_a, "x"_a, "group"_a,
        "int8 [m, padded cols], scale float32 and sum int32 [m, groups] of x float32 [m, cols].");
  m.def("matmul", &matmul, "table"_a, "rows"_a, "cols"_a, "group"_a, "bits"_a, "row_scale"_a, "affine"_a, "base"_a,
        "planes"_a, "q"_a, "scale"_a, "sum"_a, "threads"_a = 1, "y float32 [m, rows] of a nested matrix at width `bits`.");
  m.def("scores", &scores, "table"_a, "keys"_a, "q"_a, "key_scale"_a = nb::none(),
        "Attention scores float32 [n, 16 * tiles] of up to 8 queries against tiles of 16 keys (kernels.h, scores_f16 and scores_q8).");
  m.def("mix", &mix, "table"_a, "values"_a, "p"_a, "out"_a, "value_scale"_a = nb::none(),
        "out float32 [n, head_dim] plus values weighed by p (kernels.h, mix_f16 and mix_q8).");
  m.def("vector_op", &vector_op, "table"_a, "op"_a, "a"_a, "b"_a = nb::none(), "offset"_a = 0.0f,
        "One of the small slots of a kernel table on copies of a and b: (array or None, number).");
  m.def("drawing_ns", [] { return drawing_ns.load(); }, "Nanoseconds that this process spent in `draw` so far.");
  m.def("draw", &draw_token, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a,
        "The token that `uniform` of [0, 1) draws from logits float32 [vocab], as sampling.candidates defines it; -1 if they are not finite.");
  m.def("direct_read_rate", [](const std::vector<std::string>& paths, In<int64_t> offsets, int64_t bytes, int readers, double seconds) {
    expect(!paths.empty() && offsets.size() && offsets.size() % paths.size() == 0, "offsets is [files, experts]");
    expect(bytes > 0 && seconds >= 0, "read at least a byte for 0 or more seconds");
    expect_threads(readers);
    const nb::gil_scoped_release free;
    return direct_read_rate(paths, {offsets.data(), offsets.data() + offsets.size()}, bytes, readers, seconds);
  }, "paths"_a, "offsets"_a, "bytes"_a, "readers"_a, "seconds"_a,
        "Bytes per second of direct reads of `bytes` from offsets int64 [files, experts] at random, `readers` at a time; 0 where they are refused.");
  m.def("read_bandwidth", &read_bandwidth, "n_bytes"_a, "threads"_a, "seconds"_a, "table"_a = nb::none(),
        "Bytes per second read from memory by `threads` threads.");
}
