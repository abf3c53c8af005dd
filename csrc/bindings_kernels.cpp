// Kernel-level functions for Python: encoding, and each kernel by table for tests and benchmarks.
#include "encode.h"
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <tuple>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;
using namespace d2moe;

namespace {

template <class T> using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T> using Out = nb::ndarray<nb::numpy, T>;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

template <class T> T* fresh(size_t n) { return new T[n ? n : 1](); }

template <class T> Out<T> give(T* data, std::vector<size_t> shape) {
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Out<T>(data, shape.size(), shape.data(), owner);
}

const KernelTable& table_of(const std::string& name) {
  const KernelTable* t = kernel_table(name.c_str());
  expect(t != nullptr, "kernel table " + name + " is not built or not supported by this CPU");
  return *t;
}

void check_group(int group) { expect(group >= 32 && group <= 256 && group % 32 == 0, "group must be a multiple of 32 up to 256"); }

// f(begin, end) over [0, n) on `threads` plain threads.
template <class F> void split(int threads, int64_t n, F f) {
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back([=] { f(n * i / threads, n * (i + 1) / threads); });
  for (auto& w : workers) w.join();
}

nb::tuple encode(In<float> w, int group, int threads) {
  expect(w.ndim() == 2, "w is float32 [rows, cols]");
  check_group(group);
  expect(threads >= 1, "threads must be at least 1");
  const MatrixShape shape{int64_t(w.shape(0)), int64_t(w.shape(1)), group};
  auto* tiles = fresh<uint8_t>(size_t(shape.flat_bytes()));
  auto* affine = fresh<uint16_t>(size_t(shape.affine_bytes() / 2));
  {
    nb::gil_scoped_release free;
    const float* data = w.data();
    split(threads, shape.tiles(), [=](int64_t a, int64_t b) { encode_rows(data, shape.rows, shape.cols, group, a, b, tiles, affine); });
  }
  const auto t = size_t(shape.tiles()), g = size_t(shape.groups());
  nb::object bits = nb::cast(give(affine, {t, g, 2, size_t(kTileRows)}));
  return nb::make_tuple(give(tiles, {t, g, size_t(group / 4), 64}), bits.attr("view")("float16"));
}

nb::tuple pack(In<uint8_t> tiles) {
  expect(tiles.ndim() == 4 && tiles.shape(3) == 64 && tiles.shape(2) % 8 == 0, "tiles is uint8 [tiles, groups, group/4, 64]");
  const size_t n = tiles.size(), registers = n / 64;
  std::vector<uint8_t*> out;
  out.push_back(fresh<uint8_t>(n / 4));
  for (int p = 0; p < kPlanes; ++p) out.push_back(fresh<uint8_t>(n / 8));
  {
    nb::gil_scoped_release free;
    const uint8_t* in = tiles.data();
    for (size_t j = 0; j < registers; ++j) {
      uint8_t* base = out[0] + j / 4 * 64;
      for (size_t m = 0; m < 64; ++m) base[m] |= uint8_t(in[j * 64 + m] >> 6 << (2 * (j % 4)));
      for (int p = 0; p < kPlanes; ++p) {
        uint8_t* plane = out[size_t(p) + 1] + j / 8 * 64;
        for (size_t m = 0; m < 64; ++m) plane[m] |= uint8_t((in[j * 64 + m] >> (5 - p) & 1) << (j % 8));
      }
    }
  }
  const size_t t = tiles.shape(0), g = tiles.shape(1), r = tiles.shape(2);
  nb::list planes;
  for (int p = 0; p < kPlanes; ++p) planes.append(give(out[size_t(p) + 1], {t, g, r / 8, 64}));
  return nb::make_tuple(give(out[0], {t, g, r / 4, 64}), planes);
}

nb::tuple quantize_activations(const std::string& table, In<float> x, int group) {
  expect(x.ndim() == 2, "x is float32 [m, cols]");
  check_group(group);
  const KernelTable& k = table_of(table);
  const size_t m = x.shape(0), cols = x.shape(1), groups = (cols + size_t(group) - 1) / size_t(group), wide = groups * size_t(group);
  auto* q = fresh<int8_t>(m * wide);
  auto* scale = fresh<float>(m * groups);
  auto* sum = fresh<int32_t>(m * groups);
  for (size_t i = 0; i < m; ++i) k.quantize(x.data() + i * cols, int64_t(cols), group, q + i * wide, scale + i * groups, sum + i * groups);
  return nb::make_tuple(give(q, {m, wide}), give(scale, {m, groups}), give(sum, {m, groups}));
}

nb::object matmul(const std::string& table, int64_t rows, int64_t cols, int group, int bits, In<uint16_t> affine,
                  std::optional<In<uint8_t>> flat, std::optional<In<uint8_t>> base, std::vector<In<uint8_t>> planes, In<int8_t> q,
                  In<float> scale, In<int32_t> sum, int threads) {
  check_group(group);
  expect(bits >= kBaseBits && bits <= kMaxBits, "bits must be from 2 to 8");
  const KernelTable& k = table_of(table);
  Matrix w;
  w.shape = {rows, cols, group};
  expect(int64_t(affine.size()) * 2 == w.shape.affine_bytes(), "affine does not fit the shape");
  w.affine = affine.data();
  expect(bool(flat) != bool(base), "give either flat or base");
  if (flat) {
    expect(int64_t(flat->size()) == w.shape.flat_bytes(), "flat does not fit the shape");
    w.flat = flat->data();
  } else {
    expect(int64_t(base->size()) == w.shape.base_bytes() && int(planes.size()) >= bits - kBaseBits, "base or planes do not fit");
    w.base = base->data();
    for (int p = 0; p < bits - kBaseBits; ++p) {
      expect(int64_t(planes[size_t(p)].size()) == w.shape.plane_bytes(), "a plane does not fit the shape");
      w.planes[p] = planes[size_t(p)].data();
    }
  }
  const auto m = int64_t(q.shape(0));
  expect(int64_t(q.size()) == m * w.shape.groups() * group && int64_t(scale.size()) == m * w.shape.groups() &&
             int64_t(sum.size()) == m * w.shape.groups(), "activations do not fit the shape");
  const Activations x{q.data(), scale.data(), sum.data(), m};
  auto* y = fresh<float>(size_t(m * rows));
  {
    nb::gil_scoped_release free;
    split(threads, w.shape.tiles(), [&, y](int64_t a, int64_t b) { k.matmul(w, bits, x, a, b, y, rows); });
  }
  return nb::cast(give(y, {size_t(m), size_t(rows)}));
}

// The small slots, by name; each answers a float32 (or uint16) array.
nb::object vector_op(const std::string& table, const std::string& op, In<float> a, std::optional<In<float>> b,
                     std::optional<In<uint16_t>> half, float alpha) {
  const KernelTable& k = table_of(table);
  const auto n = int64_t(a.size());
  if (b) expect(int64_t(b->size()) == n, "a and b differ in length");
  if (half) expect(int64_t(half->size()) == n, "a and half differ in length");
  if (op == "dot_f32" || op == "dot_f16" || op == "sum_squares" || op == "axpy_f16" || op == "silu_mul")
    expect((op == "dot_f32" || op == "silu_mul") ? bool(b) : op == "sum_squares" || bool(half), op + " lacks an operand");
  if (op == "dot_f32") return nb::cast(k.dot_f32(a.data(), b->data(), n));
  if (op == "dot_f16") return nb::cast(k.dot_f16(half->data(), a.data(), n));
  if (op == "sum_squares") return nb::cast(k.sum_squares(a.data(), n));
  if (op == "to_f16") {
    auto* y = fresh<uint16_t>(size_t(n));
    k.to_f16(a.data(), y, n);
    return nb::cast(give(y, {size_t(n)}));
  }
  auto* y = fresh<float>(size_t(n));
  std::memcpy(y, a.data(), size_t(n) * 4);
  nb::object out = nb::cast(give(y, {size_t(n)}));
  if (op == "axpy_f16") k.axpy_f16(alpha, half->data(), y, n);
  else if (op == "exp_sum") return nb::make_tuple(out, k.exp_sum(y, alpha, n));
  else if (op == "silu_mul") k.silu_mul(y, b->data(), n);
  else if (op == "to_f32" && half) k.to_f32(half->data(), y, n);
  else throw std::invalid_argument("unknown operation " + op);
  return out;
}

// Bytes per second of plain reading over n_bytes of fresh memory.
double read_bandwidth(int64_t n_bytes, int threads, double seconds, std::optional<std::string> table) {
  const KernelTable& k = table ? table_of(*table) : *best_kernel_table();
  expect(n_bytes >= 1 << 20 && threads >= 1, "n_bytes must be at least 1 MiB");
  nb::gil_scoped_release free;
  n_bytes = round_up(n_bytes, 4096 * threads);
  void* p = mmap(nullptr, size_t(n_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  auto* data = static_cast<uint8_t*>(p);
  split(threads, n_bytes / 64, [=](int64_t a, int64_t b) { std::memset(data + a * 64, 1, size_t(b - a) * 64); });
  std::vector<double> rates;
  volatile uint64_t sink = 0;
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  const double start = now();
  do {
    const double begin = now();
    split(threads, n_bytes / 64, [&, data](int64_t a, int64_t b) { sink = sink ^ k.read_bytes(data + a * 64, (b - a) * 64); });
    rates.push_back(double(n_bytes) / (now() - begin));
  } while (now() - start < seconds);
  munmap(p, size_t(n_bytes));
  std::nth_element(rates.begin(), rates.begin() + int64_t(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

} // namespace

void bind_kernels(nb::module_& m) {
  m.def("tables", [] {
    std::vector<std::string> names;
    for (const char* name : {"scalar", "avx2", "avx512"})
      if (kernel_table(name)) names.emplace_back(name);
    return names;
  });
  m.def("encode", &encode, "w"_a, "group"_a, "threads"_a = 1);
  m.def("pack", &pack, "tiles"_a);
  m.def("quantize_activations", &quantize_activations, "table"_a, "x"_a, "group"_a);
  m.def("matmul", &matmul, "table"_a, "rows"_a, "cols"_a, "group"_a, "bits"_a, "affine"_a, "flat"_a.none(), "base"_a.none(),
        "planes"_a, "q"_a, "scale"_a, "sum"_a, "threads"_a = 1);
  m.def("vector_op", &vector_op, "table"_a, "op"_a, "a"_a, "b"_a.none() = nb::none(), "half"_a.none() = nb::none(), "alpha"_a = 0.0f);
  m.def("read_bandwidth", &read_bandwidth, "n_bytes"_a, "threads"_a, "seconds"_a, "table"_a.none() = nb::none());
}
