// Slots, reader, executor and pool under stress, without Python: built with a sanitizer by test_sanitizers.py. Files, widths, order,
// limits and interruptions are drawn from the seed; every result is compared with that of an executor that holds everything.
//
//   streaming_test FOLDER [seed [rounds]]       no seed: the clock; it is printed
#include "../../csrc/executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace d2moe;

namespace {

void require(bool ok, const char* what, int line) {
  if (ok) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::exit(1);
}
#define REQUIRE(x) require((x), #x, __LINE__)

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool once_in(int64_t n) { return below(n) == 0; }
};

// ---- slots -------------------------------------------------------------------------------------------------------------

// Where the system can, a base's pages become those of two planes and back, instead of fresh ones.
void test_pages_change_kind() {
#if defined(__linux__) && defined(MREMAP_DONTUNMAP)
  constexpr size_t kPage = 4096;
  void* a = mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(a != MAP_FAILED);
  void* b = static_cast<char*>(a) + kPage;
  if (mremap(a, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, b) != b) return;
  munmap(a, 2 * kPage);
  Slots slots(2 * kPage, 4, kPage, 24);
  slots.set_limit(2 * kPage);
  uint8_t* base = slots.take_base();
  std::memset(base, 1, kPage);
  std::memset(base + kPage, 2, kPage);
  slots.free_base(base);
  uint8_t *one = slots.take_plane(), *two = slots.take_plane();
  REQUIRE(one[0] + two[0] == 3 && one[kPage - 1] + two[kPage - 1] == 3 && slots.committed_bytes() == 2 * kPage);
  slots.free_plane(one);
  slots.free_plane(two);
  base = slots.take_base();
  REQUIRE(base[0] + base[kPage] == 3 && slots.committed_bytes() == 2 * kPage);
  slots.free_base(base);
#endif
}

void test_slots(Random& random, int rounds) {
  constexpr int64_t kBase = 8192, kPlane = 4096, kCount = 24;
  Slots slots(kBase, kCount, kPlane, kCount * 6);
  std::map<uint8_t*, std::pair<bool, uint8_t>> held; // base or plane, and what it was filled with
  int64_t limit = 0;
  for (int round = 0; round < rounds * 40; ++round) {
    if (round % 50 == 0) {
      const int64_t wanted = random.below(kCount * (kBase + 6 * kPlane));
      const int64_t used = slots.used_bytes();
      bool refused = false;
      try {
        slots.set_limit(wanted);
        limit = wanted;
      } catch (const std::runtime_error&) {
        refused = true;
      }
      REQUIRE(refused == (used > wanted));
    }
    const bool base = random.once_in(3);
    const int64_t alike = std::count_if(held.begin(), held.end(), [&](const auto& h) { return h.second.first == base; });
    if (random.once_in(2) && !held.empty()) {
      auto it = held.begin();
      std::advance(it, random.below(int64_t(held.size())));
      const auto [p, kind] = *it;
      for (int64_t i = 0; i < (kind.first ? kBase : kPlane); i += 511) REQUIRE(p[i] == kind.second); // nobody wrote there
      kind.first ? slots.free_base(p) : slots.free_plane(p);
      held.erase(it);
    } else {
      try {
        uint8_t* p = base ? slots.take_base() : slots.take_plane();
        REQUIRE(!held.count(p));
        const uint8_t fill = uint8_t(random.below(256));
        std::memset(p, fill, size_t(base ? kBase : kPlane));
        held[p] = {base, fill};
      } catch (const std::runtime_error&) {
        REQUIRE(slots.used_bytes() + (base ? kBase : kPlane) > limit || alike == (base ? kCount : kCount * 6));
      }
    }
    REQUIRE(slots.committed_bytes() <= limit && slots.used_bytes() <= slots.committed_bytes());
  }
}

// ---- reader ------------------------------------------------------------------------------------------------------------

void test_reader(Random& random, const std::string& path, const std::vector<uint8_t>& content, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int count = 1 + int(random.below(60));
    std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> memory;
    std::vector<std::unique_ptr<ReadRequest>> requests; // outlive the reader, whose threads write to them
    Reader reader({path, path}, random.once_in(2), 1 + int(random.below(6)));
    REQUIRE(reader.depth() >= 1);
    for (int i = 0; i < count; ++i) {
      auto r = std::make_unique<ReadRequest>();
      r->file = int(random.below(2));
      r->offset = random.below(int64_t(content.size()) / kAlign) * kAlign;
      const int pieces = 1 + int(random.below(kMaxPieces));
      for (int p = 0; p < pieces; ++p) {
        const size_t size = size_t(1 + random.below(3)) * kAlign;
        memory.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(kAlign, size)), &std::free);
        r->pieces[r->piece_count++] = {memory.back().get(), size};
        r->bytes += int64_t(size);
      }
      ReadRequest* request = r.get();
      reader.submit(&request, 1);
      requests.push_back(std::move(r));
    }
    if (random.once_in(5)) continue; // the reader ends with requests in its queue
    for (const auto& r : requests) {
      for (uint64_t seen = reader.finished(); !r->done.load(std::memory_order_acquire); seen = reader.finished()) {
        if (r->done.load(std::memory_order_acquire)) break;
        reader.wait(seen);
      }
      REQUIRE(!r->error && r->end_ns >= r->begin_ns);
      REQUIRE(r->done_bytes == std::min(r->bytes, int64_t(content.size()) - r->offset));
      int64_t at = r->offset, left = r->done_bytes;
      for (int p = 0; p < r->piece_count && left > 0; ++p) {
        const int64_t n = std::min(left, int64_t(r->pieces[p].iov_len));
        REQUIRE(!std::memcmp(r->pieces[p].iov_base, content.data() + at, size_t(n)));
        at += n;
        left -= n;
      }
    }
  }
}

// ---- executor ----------------------------------------------------------------------------------------------------------

constexpr int64_t kLayers = 3, kExperts = 6, kHidden = 80, kInner = 48, kTopK = 2, kTokens = 5;

ExpertShape shape_of() {
  const MatrixShape wide{kInner, kHidden, 64}, down{kHidden, kInner, 64};
  const auto base = [](const MatrixShape& m) { return m.base_bytes() + m.row_scale_bytes() + m.affine_bytes(); };
  ExpertShape s{kLayers, kExperts, kHidden, kInner, 64, 0, 0};
  s.base_bytes = round_up(2 * base(wide) + base(down), kAlign);
  s.plane_bytes = round_up(2 * wide.plane_bytes() + down.plane_bytes(), kAlign);
  return s;
}

int64_t record_bytes(const ExpertShape& s) { return s.base_bytes + kPlanes * s.plane_bytes; }

std::vector<uint8_t> layer_content(Random& random) {
  const ExpertShape s = shape_of();
  const MatrixShape wide{kInner, kHidden, 64}, down{kHidden, kInner, 64};
  std::vector<uint8_t> bytes(size_t(record_bytes(s) * kExperts));
  for (uint8_t& b : bytes) b = uint8_t(random.engine());
  for (int64_t e = 0; e < kExperts; ++e) { // any bytes are codes, steps and zeros; the factors of rows must be sane floats
    uint8_t* rows = bytes.data() + e * record_bytes(s) + 2 * wide.base_bytes() + down.base_bytes();
    const int64_t n = (2 * wide.row_scale_bytes() + down.row_scale_bytes()) / 4;
    for (int64_t i = 0; i < n; ++i) {
      const float scale = 1e-5f * float(1 + random.below(100));
      std::memcpy(rows + 4 * i, &scale, 4);
    }
  }
  return bytes;
}

void write_file(const std::string& path, const std::vector<uint8_t>& bytes) {
  FILE* file = std::fopen(path.c_str(), "wb");
  REQUIRE(file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
  std::fclose(file);
}

struct Step {
  int64_t layer, tokens;
  std::vector<float> h, gates, x;
  std::vector<int32_t> ids, bits;
};

Step draw(Random& random) {
  Step s{random.below(kLayers), 1 + random.below(kTokens), {}, {}, {}, {}, {}};
  for (int64_t i = 0; i < s.tokens * kHidden; ++i) {
    s.h.push_back(float(random.below(2001) - 1000) / 500);
    s.x.push_back(float(random.below(2001) - 1000) / 500);
  }
  for (int64_t i = 0; i < s.tokens * kTopK; ++i) {
    s.ids.push_back(i % kTopK ? int32_t((s.ids.back() + 1 + random.below(kExperts - 1)) % kExperts) : int32_t(random.below(kExperts)));
    s.bits.push_back(random.once_in(8) ? 0 : kBaseBits + int32_t(random.below(kMaxBits - kBaseBits + 1)));
    s.gates.push_back(float(1 + random.below(100)) / 100);
  }
  return s;
}

std::map<int32_t, int> widest(const Step& s) {
  std::map<int32_t, int> out;
  for (size_t i = 0; i < s.ids.size(); ++i)
    if (s.bits[i]) out[s.ids[i]] = std::max(out[s.ids[i]], int(s.bits[i]));
  return out;
}

int64_t bytes_of(const ExpertShape& s, int bits) { return bits ? s.base_bytes + (bits - kBaseBits) * s.plane_bytes : 0; }

int64_t held_bytes(const Executor& e, const ExpertShape& s) {
  int64_t sum = 0;
  for (int64_t l = 0; l < kLayers; ++l)
    for (int64_t x = 0; x < kExperts; ++x) sum += bytes_of(s, e.width(l, x));
  return sum;
}

// Evicts what `keep` does not want until `more` bytes fit; false if that is not possible.
bool make_room(Random& random, Executor& e, const ExpertShape& s, int64_t limit, int64_t more, int64_t layer, const std::map<int32_t, int>& keep) {
  for (int tries = 0; held_bytes(e, s) + more > limit; ++tries) {
    if (tries > 2000) return false;
    const int64_t l = random.below(kLayers), x = random.below(kExperts);
    if (!e.width(l, x) || (l == layer && keep.count(int32_t(x)))) continue;
    const int less = e.width(l, x) - 1;
    e.evict(l, x, less < kBaseBits || random.once_in(2) ? 0 : less);
  }
  return true;
}

void read(Executor& e, int64_t layer, int64_t expert, int bits, bool may_wait = false) {
  const Move move{int32_t(layer), int32_t(expert), bits};
  e.read(&move, 1, may_wait);
}

// `broken` is a layer whose file ends in the middle, or -1.
void test_executor(Random& random, const std::vector<std::string>& paths, const std::vector<std::string>& whole, int64_t broken, int rounds) {
  const ExpertShape s = shape_of();
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < kLayers * kExperts; ++i) offsets.push_back(i % kExperts * record_bytes(s));
  const std::vector<int64_t> kept(offsets.size(), kMaxBits);
  Runtime rt(3, kernel_table("scalar"), 1 << 22), other(1, kernel_table("scalar"), 1 << 22);
  Executor oracle(other, s, whole, offsets, kept, false, 1);
  oracle.set_limit(kLayers * kExperts * record_bytes(s));
  for (int64_t l = 0; l < kLayers; ++l)
    for (int64_t x = 0; x < kExperts; ++x) read(oracle, l, x, kMaxBits);
  Executor e(rt, s, paths, offsets, kept, random.once_in(2), 1 + int(random.below(5)));
  int64_t limit = 4 * record_bytes(s), failures = 0;
  e.set_limit(limit);
  e.log(random.once_in(2));
  for (int round = 0; round < rounds; ++round) {
    const Step step = draw(random);
    const auto wanted = widest(step);
    try {
      if (random.once_in(4)) { // another limit, down or up
        const int64_t next = record_bytes(s) * (2 + random.below(7));
        if (make_room(random, e, s, next, 0, -1, {})) e.set_limit(limit = next);
      }
      if (random.once_in(3)) { // a read that nobody waits for yet, perhaps evicted before it is used
        const int64_t l = random.below(kLayers), x = random.below(kExperts);
        if (make_room(random, e, s, limit, record_bytes(s), l, {{int32_t(x), 0}})) read(e, l, x, kBaseBits + int(random.below(7)), random.once_in(2));
        if (random.once_in(3)) e.cancel(l, x);
        if (random.once_in(2)) e.evict(l, x, 0);
      }
      // The layer in waves of what fits.
      std::vector<std::pair<int32_t, int>> items(wanted.begin(), wanted.end());
      std::shuffle(items.begin(), items.end(), random.engine);
      e.begin(step.layer, step.tokens, kTopK, step.h.data(), step.ids.data(), step.bits.data());
      const int64_t stop = random.once_in(10) ? random.below(int64_t(items.size()) + 1) : -1;
      bool stopped = false;
      for (size_t at = 0; at < items.size() && !stopped;) {
        std::map<int32_t, int> wave;
        std::vector<int32_t> experts;
        int64_t need = 0;
        while (at < items.size() && (wave.empty() || (need + record_bytes(s) <= limit && !random.once_in(4)))) {
          const auto [x, b] = items[at++];
          need += bytes_of(s, std::max(b, e.width(step.layer, x)));
          wave[x] = b;
          experts.push_back(x);
        }
        int64_t more = 0;
        for (const auto& [x, b] : wave) more += std::max<int64_t>(0, bytes_of(s, b) - bytes_of(s, e.width(step.layer, x)));
        REQUIRE(make_room(random, e, s, limit, more, step.layer, wave));
        std::vector<Move> moves;
        for (const auto& [x, b] : wave) moves.push_back({int32_t(step.layer), x, b});
        e.read(moves.data(), moves.size());
        if (stop >= 0 && int64_t(at) > stop) { // as when the step is interrupted: reads are on their way
          e.abandon();
          stopped = true;
        } else {
          e.compute(experts.data(), int64_t(experts.size()));
        }
      }
      if (stopped) continue;
      if (items.empty()) e.compute(nullptr, 0);
      std::vector<float> x = step.x, expected = step.x;
      e.finish(step.gates.data(), x.data());
      oracle.begin(step.layer, step.tokens, kTopK, step.h.data(), step.ids.data(), step.bits.data());
      oracle.compute(nullptr, 0);
      oracle.finish(step.gates.data(), expected.data());
      REQUIRE(!std::memcmp(x.data(), expected.data(), x.size() * sizeof(float)));
      for (float v : x) REQUIRE(std::isfinite(v));
    } catch (const StorageFailure&) {
      e.abandon();
      REQUIRE(broken >= 0);
      ++failures;
    }
    REQUIRE(held_bytes(e, s) <= limit);
    if (random.once_in(20)) e.take_events();
  }
  REQUIRE((broken >= 0) == (failures > 0));
}

// ---- pool --------------------------------------------------------------------------------------------------------------

void test_pool(Random& random, int rounds) {
  Pool pool(1 + int(random.below(5)));
  for (int round = 0; round < rounds * 4; ++round) {
    std::vector<int64_t> touched(size_t(random.below(3000)), 0); // not atomic: no element may be touched by two threads
    pool.parallel_for(int64_t(touched.size()), 1 + random.below(40), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ++touched[size_t(i)];
    });
    for (int64_t n : touched) REQUIRE(n == 1);
    if (random.once_in(8)) usleep(100); // long enough for the workers to go to sleep
  }
}

} // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const std::string folder = argv[1];
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 100;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  Random random{std::mt19937_64(seed)};
  std::vector<std::string> paths;
  std::vector<uint8_t> content;
  for (int64_t l = 0; l < kLayers; ++l) {
    content = layer_content(random);
    paths.push_back(folder + "/layer-" + std::to_string(l));
    write_file(paths.back(), content);
  }
  test_pages_change_kind();
  test_slots(random, rounds);
  test_pool(random, rounds);
  test_reader(random, paths.back(), content, rounds / 2);
  test_executor(random, paths, paths, -1, rounds * 2);
  std::vector<std::string> cut = paths;
  cut[1] = folder + "/cut";
  content.resize(size_t(record_bytes(shape_of()) * kExperts));
  FILE* file = std::fopen(paths[1].c_str(), "rb");
  REQUIRE(file && std::fread(content.data(), 1, content.size(), file) == content.size());
  std::fclose(file);
  content.resize(content.size() / 2 + size_t(random.below(4096)));
  write_file(cut[1], content);
  test_executor(random, cut, paths, 1, rounds * 2);
  std::printf("slots, pool, reader and executor are well\n");
}
