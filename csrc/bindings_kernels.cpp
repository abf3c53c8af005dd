// Kernels and encoder as Python sees them, for conversion, tests and benchmarks. The engine itself calls them in C++.
#include "encode.h"
#include "kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
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

namespace nb = nanobind;
using namespace nb::literals;
using namespace d2moe;

void bind_kernels(nb::module_& m);

namespace {

template <class T> using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T> using Out = nb::ndarray<nb::numpy, T, nb::c_contig, nb::device::cpu>;
using Shape = std::vector<size_t>;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

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
  for (const char* name : {"scalar", "avx2", "avx512"})
    if (kernel_table(name)) names.emplace_back(name);
  return names;
}

auto encode(In<float> w, int group, int threads) {
  expect_group(group);
  expect_threads(threads);
  expect(w.ndim() == 2 && w.size() > 0, "w has shape " + text(shape_of(w)) + ", expected [rows, cols], not empty");
  const MatrixShape s{int64_t(w.shape(0)), int64_t(w.shape(1)), group};
  auto tiles = fresh<uint8_t>({size_t(s.tiles()), size_t(s.groups()), size_t(group / 4), kRegisterBytes});
  auto affine = fresh<uint16_t>({size_t(s.tiles()), size_t(s.groups()), 2, kTileRows});
  const float* in = w.data();
  uint8_t* codes = tiles.data();
  uint16_t* scales = affine.data();
  {
    nb::gil_scoped_release free;
    split(s.tiles(), threads, [=](int64_t a, int64_t b) { encode_rows(in, s.rows, s.cols, s.group, a, b, codes, scales); });
  }
  return std::make_tuple(tiles, affine);
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

// y f32 [m, rows]; `flat`, or `base` and at least bits - 2 planes.
Out<float> matmul(const std::string& table, int64_t rows, int64_t cols, int group, int bits, In<uint16_t> affine,
                  std::optional<In<uint8_t>> flat, std::optional<In<uint8_t>> base, std::vector<In<uint8_t>> planes,
                  In<int8_t> q, In<float> scale, In<int32_t> sum, int threads) {
  const KernelTable& k = table_of(table);
  expect_group(group);
  expect_threads(threads);
  expect(rows > 0 && cols > 0, "rows and cols must be positive");
  expect(bits >= kBaseBits && bits <= kMaxBits, "bits is " + std::to_string(bits) + ", expected 2 to 8");
  expect(bool(flat) != bool(base), "give either flat or base");
  Matrix w;
  w.shape = {rows, cols, group};
  const size_t tiles = size_t(w.shape.tiles()), groups = size_t(w.shape.groups()), per = size_t(group);
  expect_shape(affine, {tiles, groups, 2, kTileRows}, "affine");
  w.affine = affine.data();
  if (flat) {
    expect_shape(*flat, {tiles, groups, per / 4, kRegisterBytes}, "flat");
    expect(planes.empty(), "a flat matrix has no planes");
    w.flat = flat->data();
  } else {
    expect_shape(*base, {tiles, groups, per / 16, kRegisterBytes}, "base");
    w.base = base->data();
    expect(planes.size() >= size_t(bits - kBaseBits) && planes.size() <= kPlanes,
           std::to_string(planes.size()) + " planes given, " + std::to_string(bits) + " bits need " + std::to_string(bits - kBaseBits) + " to 6");
    for (size_t p = 0; p < planes.size(); ++p) {
      expect_shape(planes[p], {tiles, groups, per / 32, kRegisterBytes}, "plane");
      w.planes[p] = planes[p].data();
    }
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

// One of the small slots, on copies. a and b are f32 or f16 bits (uint16) as the slot wants them; answers (array or
// None, number): dot_f32(a, b), dot_f16(a, b), axpy_f16(alpha, a, y=b), sum_squares(a), exp_sum(a, offset=alpha),
// silu_mul(gate=a, up=b), to_f16(a), to_f32(a).
nb::object vector_op(const std::string& table, const std::string& op, nb::object a, nb::object b, float alpha) {
  const KernelTable& k = table_of(table);
  const auto floats = [&](const nb::object& o, const char* name) {
    In<float> array;
    expect(nb::try_cast(o, array, false) && array.ndim() == 1, op + ": " + name + " must be float32 [n], contiguous");
    return array;
  };
  const auto halves = [&](const nb::object& o, const char* name) {
    In<uint16_t> array;
    expect(nb::try_cast(o, array, false) && array.ndim() == 1, op + ": " + name + " must be uint16 [n] (the bits of float16), contiguous");
    return array;
  };
  const auto same = [&](size_t x, size_t y) { expect(x == y, op + ": a and b differ in length"); };
  const auto copy = [](const In<float>& x) {
    auto y = fresh<float>({x.size()});
    if (x.size()) std::memcpy(y.data(), x.data(), x.size() * sizeof(float));
    return y;
  };
  const auto answer = [](const auto& array, float number) { return nb::cast(std::make_tuple(array, number)); };
  const auto only = [](float number) { return nb::cast(std::make_tuple(nb::none(), number)); };
  if (op == "dot_f32" || op == "dot_f16") {
    const auto y = floats(b, "b");
    if (op == "dot_f32") {
      const auto x = floats(a, "a");
      same(x.size(), y.size());
      return only(k.dot_f32(x.data(), y.data(), int64_t(x.size())));
    }
    const auto x = halves(a, "a");
    same(x.size(), y.size());
    return only(k.dot_f16(x.data(), y.data(), int64_t(x.size())));
  }
  if (op == "axpy_f16") {
    const auto x = halves(a, "a");
    auto y = copy(floats(b, "b"));
    same(x.size(), y.size());
    k.axpy_f16(alpha, x.data(), y.data(), int64_t(x.size()));
    return answer(y, 0.0f);
  }
  if (op == "to_f32") {
    const auto x = halves(a, "a");
    auto y = fresh<float>({x.size()});
    k.to_f32(x.data(), y.data(), int64_t(x.size()));
    return answer(y, 0.0f);
  }
  const auto x = floats(a, "a");
  const int64_t n = int64_t(x.size());
  if (op == "sum_squares") return only(k.sum_squares(x.data(), n));
  if (op == "to_f16") {
    auto y = fresh<uint16_t>({x.size()});
    k.to_f16(x.data(), y.data(), n);
    return answer(y, 0.0f);
  }
  auto y = copy(x);
  if (op == "exp_sum") {
    const float sum = k.exp_sum(y.data(), alpha, n);
    return answer(y, sum);
  }
  expect(op == "silu_mul", "vector op \"" + op + "\" does not exist");
  const auto up = floats(b, "b");
  same(x.size(), up.size());
  k.silu_mul(y.data(), up.data(), n);
  return answer(y, 0.0f);
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
        "Codes uint8 [tiles, groups, group/4, 64] and affine float16 bits uint16 [tiles, groups, 2, 16] of w float32 [rows, cols].");
  m.def("pack", &pack, "tiles"_a, "Base plane and the six one-bit planes of register-ordered codes.");
  m.def("quantize_activations", &quantize_activations, "table"_a, "x"_a, "group"_a,
        "int8 [m, padded cols], scale float32 and sum int32 [m, groups] of x float32 [m, cols].");
  m.def("matmul", &matmul, "table"_a, "rows"_a, "cols"_a, "group"_a, "bits"_a, "affine"_a, "flat"_a.none(), "base"_a.none(),
        "planes"_a, "q"_a, "scale"_a, "sum"_a, "threads"_a = 1, "y float32 [m, rows] at width `bits` of a flat or nested matrix.");
  m.def("vector_op", &vector_op, "table"_a, "op"_a, "a"_a, "b"_a = nb::none(), "alpha"_a = 0.0f,
        "One of the small slots of a kernel table on copies of a and b: (array or None, number).");
  m.def("read_bandwidth", &read_bandwidth, "n_bytes"_a, "threads"_a, "seconds"_a, "table"_a = nb::none(),
        "Bytes per second read from memory by `threads` threads.");
}
