// Every kernel table that this binary has and this CPU can run, against the scalar one, bit for bit, without Python. Inputs
// depend on the seed alone, so the digest of all outputs must be the same for every table, CPU, compiler and machine.
// NaNs count as equal: machines differ in the bits of those that they make.
//
//   kernels_test [seed [rounds]]       no seed: D2MOE_SEED, else the clock; it is printed
#include "../../csrc/kernels.h"
#include "../../csrc/rotate.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

using namespace d2moe;

namespace {

// ---- random numbers, the same everywhere -----------------------------------------------------------------------------
// Compilers differ in the order in which they evaluate arguments and operands: at most one number is drawn in an expression,
// except in braces, which go from left to right.

struct Random {
  uint64_t state;
  uint64_t bits() { // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1D;
  }
  int64_t below(int64_t n) { return int64_t((bits() >> 33) % uint64_t(n)); }
  int64_t between(int64_t a, int64_t b) { return a + below(b - a + 1); }
  float unit() { return float(int64_t(bits() >> 40) - (1 << 23)) * 0x1p-23f; } // [-1, 1), exact
  float spread(int low, int high) {
    const float mantissa = unit();
    return std::ldexp(mantissa, int(between(low, high)));
  }
};

// An array that ends where memory ends: a read or write past it is a crash.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t n) : n_(n) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = round_up(n * int64_t(sizeof(T)) + !n, page);
    bytes_ = size_t(used + page);
    map_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED || mprotect(static_cast<char*>(map_) + used, size_t(page), PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(map_) + used) - n;
  }
  Buffer(const Buffer& other) : Buffer(other.n_) { if (n_) std::memcpy(data_, other.data_, size_t(n_) * sizeof(T)); }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(map_, bytes_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  template <class F> Buffer& fill(F&& f) {
    for (int64_t i = 0; i < n_; ++i) data_[i] = T(f());
    return *this;
  }

 private:
  int64_t n_;
  size_t bytes_;
  void* map_;
  T* data_;
};

// ---- comparing -------------------------------------------------------------------------------------------------------

uint64_t plain(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return v != v ? 0x7FC00000 : u;
}
uint64_t plain_half(uint16_t v) { return (v & 0x7FFF) > 0x7C00 ? 0x7E00 : v; }
template <class T> uint64_t plain(T v) { return uint64_t(v); }

// For whoever crashes: what was compared last.
char where[512] = "nothing";
extern "C" void crashed(int signal) {
  static const char kAfter[] = "CRASHED (memory or instruction) after: ";
  const bool told = write(1, kAfter, sizeof kAfter - 1) > 0 && write(1, where, std::strlen(where)) > 0 && write(1, "\n", 1) > 0;
  _exit(told ? 1 : 128 + signal);
}

// One table under test: counts, hashes (FNV-1a) and compares what comes out.
struct Check {
  const KernelTable& table;
  const KernelTable& scalar;
  uint64_t seed;
  uint64_t digest = 0xCBF29CE484222325;
  int64_t outputs = 0, wrong = 0;
  std::set<std::string> ways = {};

  void hash(uint64_t v) {
    for (int i = 0; i < 4; ++i) digest = (digest ^ (v >> 8 * i & 255)) * 0x100000001B3;
  }
  template <class T> void same(const char* slot, const std::string& shape, const T* got, const T* wanted, int64_t n, bool halves = false) {
    std::snprintf(where, sizeof where, "table %s slot %s shape [%s] seed %" PRIu64, table.name, slot, shape.c_str(), seed);
    bool told = false;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t a = halves ? plain_half(uint16_t(got[i])) : plain(got[i]), b = halves ? plain_half(uint16_t(wanted[i])) : plain(wanted[i]);
      hash(a);
      ++outputs;
      if (a == b) continue;
      if (!told)
        std::printf("DIFFERENT %s index %" PRId64 ": %.9g (%" PRIx64 ") and not %.9g (%" PRIx64 ")\n", where, i, double(got[i]), a,
                    double(wanted[i]), b);
      told = true;
      ++wrong;
    }
  }
  template <class T> void same(const char* slot, const std::string& shape, const Buffer<T>& got, const Buffer<T>& wanted, bool halves = false) {
    same(slot, shape, got.data(), wanted.data(), got.size(), halves);
  }
};

template <class... N> std::string shape_of(const char* names, N... n) {
  std::string s = names;
  ((s += " " + std::to_string(n)), ...);
  return s;
}

constexpr int kGroups[] = {32, 64, 96, 128, 160, 256};
constexpr float kUntouched = -12345.678f; // no kernel makes it of what it is given

// ---- products --------------------------------------------------------------------------------------------------------

enum class Codes { Random, Ones, Zeros };

struct Product {
  MatrixShape shape;
  int64_t m;
  Buffer<float> row_scale;
  Buffer<uint8_t> affine, base;
  std::vector<Buffer<uint8_t>> planes;
  Buffer<int8_t> q;
  Buffer<float> scale;
  Buffer<int32_t> sum;

  Product(Random& r, int64_t rows, int64_t cols, int group, int64_t tokens, int bits, Codes codes = Codes::Random)
      : shape{rows, cols, group}, m(tokens), row_scale(shape.tiles() * kTileRows), affine(shape.affine_bytes()), base(shape.base_bytes()),
        q(m * shape.groups() * group), scale(m * shape.groups()), sum(m * shape.groups()) {
    const auto code = [&] { return codes == Codes::Random ? r.bits() >> 56 : codes == Codes::Ones ? 255 : 0; };
    base.fill(code);
    planes.reserve(size_t(bits - kBaseBits)); // planes past the width are absent
    for (int p = 0; p < bits - kBaseBits; ++p) planes.emplace_back(shape.plane_bytes()).fill(code);
    const int64_t kind = codes == Codes::Random ? 2 : r.below(2);
    affine.fill([&] { return kind == 2 ? r.bits() >> 56 : kind ? 255 : 0; });
    row_scale.fill([&] { return r.spread(-12, 0); });
    scale.fill([&] { return std::fabs(r.spread(-12, 4)); });
    const int64_t extreme = codes == Codes::Random ? 0 : r.between(1, 3); // all 127, all -127, or of both
    q.fill([&] { return extreme == 1 ? 127 : extreme == 2 ? -127 : extreme == 3 ? 127 - 254 * r.below(2) : r.between(-127, 127); });
    add_up();
  }
  void add_up() {
    for (int64_t i = 0; i < sum.size(); ++i) {
      sum[i] = 0;
      for (int k = 0; k < shape.group; ++k) sum[i] += q[i * shape.group + k];
    }
  }
  std::string name(int bits) const {
    return shape_of("rows, cols, group, m, bits", shape.rows, shape.cols, shape.group, m, bits);
  }
  // Tokens [i0, i1) and tiles [tile0, tile1) of the product into y.
  void run(const KernelTable& t, int bits, Buffer<float>& y, int64_t ldy, int64_t i0, int64_t i1, int64_t tile0, int64_t tile1) const {
    Matrix w;
    w.shape = shape;
    w.row_scale = row_scale.data();
    w.affine = affine.data();
    w.base = base.data();
    for (size_t p = 0; p < planes.size(); ++p) w.planes[p] = planes[p].data();
    const int64_t groups = shape.groups();
    t.matmul(w, bits, {q.data() + i0 * groups * shape.group, scale.data() + i0 * groups, sum.data() + i0 * groups, i1 - i0}, tile0, tile1,
             y.data() + i0 * ldy, ldy);
  }
};

Buffer<float> untouched(int64_t n) { return Buffer<float>(n).fill([] { return kUntouched; }); }

// The whole against the scalar table, then the same in random pieces of tokens and of tiles.
void check_product(Check& c, Random& r, const Product& p, int bits, bool pieces) {
  const int64_t gap = r.below(3) * 5, ldy = p.shape.rows + gap, n = p.m * ldy, tiles = p.shape.tiles();
  auto got = untouched(n), wanted = untouched(n);
  p.run(c.table, bits, got, ldy, 0, p.m, 0, tiles);
  p.run(c.scalar, bits, wanted, ldy, 0, p.m, 0, tiles);
  c.ways.insert(c.table.variant(bits, p.m));
  c.same("matmul", p.name(bits), got, wanted);
  if (!pieces) return;
  auto parts = untouched(n);
  for (int64_t i = 0, next; i < p.m; i = next) {
    next = std::min(p.m, i + r.between(1, 9));
    for (int64_t tile = 0, end; tile < tiles; tile = end) {
      end = std::min(tiles, tile + r.between(1, 3));
      p.run(c.table, bits, parts, ldy, i, next, tile, end);
    }
  }
  c.same("matmul in pieces", p.name(bits), parts, wanted);
}

void check_matmul(Check& c, Random& r) {
  for (const int group : kGroups)
    for (int bits = kBaseBits; bits <= kMaxBits; ++bits) {
      for (int64_t m = 1; m <= 9; ++m)
        check_product(c, r, Product{r, r.between(1, 40), r.between(1, 3 * group), group, m, bits}, bits, m > 1);
      const int64_t extreme = r.between(1, 9);
      for (const Codes codes : {Codes::Ones, Codes::Zeros})
        check_product(c, r, Product{r, r.between(1, 40), 2 * group, group, extreme, bits, codes}, bits, false);
    }
  for (int bits = kBaseBits; bits <= kMaxBits; ++bits) { // more tokens; more columns than a table unpacks at a time
    const int group = kGroups[r.below(6)];
    check_product(c, r, Product{r, r.between(1, 40), r.between(1, 2 * group), group, r.between(10, 130), bits}, bits, true);
    for (const int64_t m : {int64_t(1), r.between(2, 4), r.between(5, 9)})
      check_product(c, r, Product{r, r.between(17, 31), r.between(2000, 2600), group, m, bits}, bits, false);
  }
  check_product(c, r, Product{r, 20, 200, 64, 130, 4}, 4, true);
  Product far(r, 33, 200, 32, 6, 4); // sums that underflow, overflow and are not numbers
  far.scale.fill([&] { return r.below(2) ? 0x1p-140f : 0x1p120f; });
  check_product(c, r, far, 4, true);
}

// ---- activations and the small slots ---------------------------------------------------------------------------------

void check_quantize(Check& c, Random& r) {
  for (const int group : kGroups)
    for (const int64_t cols : {int64_t(1), int64_t(31), int64_t(64), int64_t(100), int64_t(515), r.between(1, 700)})
      for (int kind = 0; kind < 6; ++kind) {
        const int size = int(r.between(-60, 60));
        const int64_t rare = r.between(2, 40);
        Buffer<float> x(cols);
        x.fill([&] {
          switch (kind) {
            case 0: return std::ldexp(r.unit(), size);
            case 1: return 0.0f;
            case 2: return r.below(rare) ? 0.0f : r.spread(-20, 20);
            case 3: return float(r.between(-254, 254)) * 0.5f; // many exact halves
            case 4: return 0x1p-101f; // too small to count
            default: return r.spread(-4, 4);
          }
        });
        if (kind == 3) x[0] = 127.0f;
        const int64_t groups = (cols + group - 1) / group;
        Buffer<int8_t> q(groups * group), q2(groups * group);
        Buffer<float> scale(groups), scale2(groups);
        Buffer<int32_t> sum(groups), sum2(groups);
        c.table.quantize(x.data(), cols, group, q.data(), scale.data(), sum.data());
        c.scalar.quantize(x.data(), cols, group, q2.data(), scale2.data(), sum2.data());
        const std::string shape = shape_of("cols, group, kind", cols, group, kind);
        c.same("quantize q", shape, q, q2);
        c.same("quantize scale", shape, scale, scale2);
        c.same("quantize sum", shape, sum, sum2);
      }
}

void check_sums(Check& c, Random& r, int64_t n) {
  const std::string shape = shape_of("n", n);
  Buffer<float> a(n), b(n);
  a.fill([&] { return r.spread(-12, 12); });
  b.fill([&] { return r.spread(-12, 12); });
  const float dot = c.table.dot_f32(a.data(), b.data(), n), dot2 = c.scalar.dot_f32(a.data(), b.data(), n);
  c.same("dot_f32", shape, &dot, &dot2, 1);
  const float squares = c.table.sum_squares(a.data(), n), squares2 = c.scalar.sum_squares(a.data(), n);
  c.same("sum_squares", shape, &squares, &squares2, 1);
}

void check_exponentials(Check& c, Random& r, int64_t n) {
  constexpr float kFar[] = {0.0f,    -0.0f,  88.8f,    -87.4f,   -103.9f,  -104.5f,   151.0f,
                            -151.0f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
  for (int kind = 0; kind < 3; ++kind) { // ordinary, wide, with a few from the list
    const std::string shape = shape_of("n, kind", n, kind);
    Buffer<float> x(n), up(n);
    x.fill([&] { return kind == 2 && !r.below(5) ? kFar[r.below(13)] : kind ? r.unit() * 120.0f : r.spread(-6, 4); }); // ?: is in order
    up.fill([&] { return r.spread(-6, 6); });
    const float offset = kind ? 0.0f : r.unit() * 3.0f;
    Buffer<float> got(x), wanted(x);
    const float sum = c.table.exp_sum(got.data(), offset, n), sum2 = c.scalar.exp_sum(wanted.data(), offset, n);
    c.same("exp_sum x", shape, got, wanted);
    c.same("exp_sum", shape, &sum, &sum2, 1);
    Buffer<float> gate(x), gate2(x);
    c.table.silu_mul(gate.data(), up.data(), n);
    c.scalar.silu_mul(gate2.data(), up.data(), n);
    c.same("silu_mul", shape, gate, gate2);
  }
}

void check_conversions(Check& c, const Buffer<float>& x, const Buffer<uint16_t>& h, const char* kind) {
  const std::string shape = shape_of(kind, x.size(), h.size());
  Buffer<uint16_t> halves(x.size()), halves2(x.size());
  c.table.to_f16(x.data(), halves.data(), x.size());
  c.scalar.to_f16(x.data(), halves2.data(), x.size());
  c.same("to_f16", shape, halves, halves2, true);
  Buffer<float> floats(h.size()), floats2(h.size());
  c.table.to_f32(h.data(), floats.data(), h.size());
  c.scalar.to_f32(h.data(), floats2.data(), h.size());
  c.same("to_f32", shape, floats, floats2);
}

void check_small(Check& c, Random& r) {
  for (const int64_t n : {int64_t(0), int64_t(1), int64_t(3), int64_t(7), int64_t(8), int64_t(15), int64_t(16), int64_t(17), int64_t(31),
                          int64_t(33), int64_t(48), int64_t(64), int64_t(100), int64_t(127), r.between(128, 300), int64_t(2051)}) {
    check_sums(c, r, n);
    check_exponentials(c, r, n);
    Buffer<float> x(n);
    Buffer<uint16_t> h(n);
    x.fill([&] { return r.spread(-30, 18); });
    h.fill([&] { return r.bits() >> 48; });
    check_conversions(c, x, h, "numbers, halves");
    Buffer<uint8_t> bytes(n * 64);
    bytes.fill([&] { return r.bits() >> 56; });
    const uint64_t mixed = c.table.read_bytes(bytes.data(), n * 64), mixed2 = c.scalar.read_bytes(bytes.data(), n * 64);
    const uint32_t both[2] = {uint32_t(mixed), uint32_t(mixed >> 32)}, both2[2] = {uint32_t(mixed2), uint32_t(mixed2 >> 32)};
    c.same("read_bytes", shape_of("n", n * 64), both, both2, 2);
  }
  // Every half; every float that is one, or is in the middle of two, or beside a middle.
  Buffer<uint16_t> all(65536);
  Buffer<float> near(4 * 65536), exact(65536);
  for (int64_t i = 0; i < 65536; ++i) all[i] = uint16_t(i);
  c.scalar.to_f32(all.data(), exact.data(), 65536);
  for (int64_t i = 0; i < 65536; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &exact[i], 4);
    const uint32_t middle = bits + 0x1000; // subnormal halves have theirs elsewhere; random numbers meet those
    for (int k = 0; k < 4; ++k) {
      const uint32_t v = k ? middle + uint32_t(k - 2) : bits;
      std::memcpy(&near[4 * i + k], &v, 4);
    }
  }
  check_conversions(c, near, all, "all halves");
  Buffer<float> tiny(4096);
  tiny.fill([&] {
    const float middle = float(r.between(-4096, 4096)) * 0.5f, off = r.spread(-24, -12);
    return std::ldexp(r.below(2) ? middle : middle + off, -24);
  });
  check_conversions(c, tiny, all, "subnormal halves");
}

// ---- attention -------------------------------------------------------------------------------------------------------

uint16_t random_half(Random& r) {
  const int64_t exponent = r.between(0, 18);
  return uint16_t(exponent << 10 | (r.bits() >> 48 & 0x83FF));
}

void check_scores(Check& c, Random& r, int64_t head_dim, int64_t tiles, int64_t n) {
  const std::string shape = shape_of("head_dim, tiles, n", head_dim, tiles, n);
  const int64_t count = tiles * kKeyTile, qs = head_dim + r.below(2) * 3, ss = count + r.below(2) * 7;
  const int64_t outputs = (n - 1) * ss + count;
  Buffer<uint16_t> halves(count * head_dim);
  halves.fill([&] { return random_half(r); });
  Buffer<uint8_t> codes(count * head_dim);
  codes.fill([&] { return r.below(8) ? r.bits() >> 56 : 255 * r.below(2); });
  Buffer<float> key_scale(count), q((n - 1) * qs + head_dim);
  key_scale.fill([&] { return std::fabs(r.spread(-9, 2)); });
  q.fill([&] { return r.spread(-6, 6); });
  Buffer<int8_t> q8((n - 1) * qs + head_dim);
  q8.fill([&] { return r.below(8) ? r.between(-127, 127) : 127 - 254 * r.below(2); });
  for (int kind = 0; kind < 2; ++kind) {
    auto got = untouched(outputs), wanted = untouched(outputs);
    for (const bool ours : {true, false}) {
      const KernelTable& t = ours ? c.table : c.scalar;
      const Rows rows{ours ? got.data() : wanted.data(), ss};
      if (kind) t.scores_q8(codes.data(), key_scale.data(), tiles, head_dim, q8.data(), qs, n, rows);
      else t.scores_f16(halves.data(), tiles, head_dim, {q.data(), qs}, n, rows);
    }
    c.same(kind ? "scores_q8" : "scores_f16", shape, got, wanted);
  }
}

void check_mix(Check& c, Random& r, int64_t head_dim, int64_t count, int64_t n) {
  const std::string shape = shape_of("head_dim, count, n", head_dim, count, n);
  const int64_t ps = count + r.below(2) * 5, os = head_dim + r.below(2) * 3;
  Buffer<uint16_t> halves(count * head_dim);
  halves.fill([&] { return random_half(r); });
  Buffer<int8_t> codes(count * head_dim);
  codes.fill([&] { return r.between(-127, 127); });
  Buffer<float> value_scale(count), p((n - 1) * ps + count), start((n - 1) * os + head_dim);
  value_scale.fill([&] { return std::fabs(r.spread(-9, 2)); });
  p.fill([&] { return std::fabs(r.spread(-20, 0)); });
  start.fill([&] { return r.below(4) ? r.spread(-4, 4) : 0.0f; });
  for (int kind = 0; kind < 2; ++kind) {
    Buffer<float> got(start), wanted(start);
    for (const bool ours : {true, false}) {
      const KernelTable& t = ours ? c.table : c.scalar;
      const Rows rows{ours ? got.data() : wanted.data(), os};
      if (kind) t.mix_q8(codes.data(), value_scale.data(), count, head_dim, {p.data(), ps}, n, rows);
      else t.mix_f16(halves.data(), count, head_dim, {p.data(), ps}, n, rows);
    }
    c.same(kind ? "mix_q8" : "mix_f16", shape, got, wanted);
  }
}

void check_attention(Check& c, Random& r) {
  for (const int64_t head_dim : {4, 8, 20, 32, 64, 80, 128})
    for (int64_t n = 1; n <= kQueries; ++n) {
      check_scores(c, r, head_dim, r.between(1, 3), n);
      check_mix(c, r, head_dim, r.between(1, 40), n);
    }
  for (const int64_t n : {int64_t(1), int64_t(kQueries)}) check_mix(c, r, 64, 300, n);
}

// No slot of a table, but vectors that every compiler cuts in its own way: against sums and differences one by one.
void check_rotation(Check& c, Random& r) {
  for (int span = 16; span <= 1024; span *= 2) {
    const int64_t n = span * r.between(1, 3) + r.between(0, 15);
    Buffer<float> got(n), wanted(n);
    for (int64_t i = 0; i < n; ++i) got[i] = wanted[i] = r.spread(-8, 8);
    rotate(got.data(), n, span);
    for (int64_t first = 0; first + span <= n; first += span)
      for (int step = 1; step < span; step *= 2)
        for (int i = 0; i < span; ++i)
          if (!(i & step)) {
            float &a = wanted[first + i], &b = wanted[first + i + step];
            const float sum = a + b, difference = a - b;
            a = sum;
            b = difference;
          }
    c.same("rotate", shape_of("n, span, kind", n, span, 0), got, wanted);
  }
}

bool check_table(const KernelTable& table, uint64_t seed, int64_t rounds) {
  Check c{table, *kernel_table("scalar"), seed};
  Random r{seed * 0x9E3779B97F4A7C15 | 1}; // the state must not be zero
  for (int i = 0; i < 16; ++i) r.bits();
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < rounds; ++i) {
    check_quantize(c, r);
    check_small(c, r);
    check_attention(c, r);
    check_rotation(c, r);
    check_matmul(c, r);
  }
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const std::string& way : c.ways) std::printf("%s matmul: %s\n", table.name, way.c_str());
  std::printf("%s: %" PRId64 " outputs, %" PRId64 " different, digest %016" PRIx64 ", %.1f s\n", table.name, c.outputs, c.wrong, c.digest, took);
  std::fflush(stdout);
  return !c.wrong;
}

} // namespace

int main(int argc, char** argv) {
  const char* given = argc > 1 ? argv[1] : std::getenv("D2MOE_SEED");
  const auto clock = std::chrono::system_clock::now().time_since_epoch().count();
  const uint64_t seed = given && *given ? std::strtoull(given, nullptr, 10) : uint64_t(clock) / 1000 % 1000000000;
  const int64_t rounds = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 4;
  std::printf("seed %" PRIu64 ", %" PRId64 " rounds\n", seed, rounds);
  std::fflush(stdout);
  for (const int fatal : {SIGSEGV, SIGBUS, SIGILL}) std::signal(fatal, crashed);
  bool good = true;
  for (const char* name : kTableNames)
    if (const KernelTable* table = kernel_table(name)) good = check_table(*table, seed, rounds) && good;
  return good ? 0 : 1;
}
