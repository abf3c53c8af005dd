// The only file, with bindings_kernels.cpp and bindings_ledger.cpp, that knows Python: arrays are checked here, the GIL is released here.
#include "bindings.h"
#include "program.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

using namespace d2moe;

namespace {

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

template <class A> void expect_size(const A& a, int64_t size, const char* name) {
  expect(int64_t(a.size()) == size,
         std::string(name) + " has " + std::to_string(a.size()) + " elements, expected " + std::to_string(size));
}

template <class A> void expect_room(const A& a, int64_t size, const char* name) {
  expect(int64_t(a.size()) >= size,
         std::string(name) + " has " + std::to_string(a.size()) + " elements, expected at least " + std::to_string(size));
}

// Keeps the arrays that a Linear points into alive.
struct PyLinear {
  Linear linear;
  std::vector<nb::object> kept;

  PyLinear(int64_t rows, int64_t cols, int group, int bits, In<float> row_scale, In<uint8_t> affine, In<uint8_t> base,
           const std::vector<In<uint8_t>>& planes, std::optional<In<float>> bias) {
    expect(rows > 0 && cols > 0 && group > 0 && group % 32 == 0 && group <= 256, "a linear layer has rows, columns and a group");
    expect(bits >= kBaseBits && bits <= kMaxBits && int(planes.size()) == bits - kBaseBits, "a linear layer has bits - 2 planes");
    Matrix& m = linear.matrix;
    m.shape = {rows, cols, group};
    linear.bits = bits;
    expect_size(row_scale, m.shape.row_scale_bytes() / 4, "row_scale");
    expect_size(affine, m.shape.affine_bytes(), "affine");
    expect_size(base, m.shape.base_bytes(), "base");
    m.row_scale = row_scale.data();
    m.affine = affine.data();
    m.base = base.data();
    for (size_t p = 0; p < planes.size(); ++p) {
      expect_size(planes[p], m.shape.plane_bytes(), "plane");
      m.planes[p] = planes[p].data();
      kept.push_back(nb::cast(planes[p]));
    }
    if (bias) {
      expect_size(*bias, rows, "bias");
      linear.bias = bias->data();
      kept.push_back(nb::cast(*bias));
    }
    for (nb::object array : {nb::cast(row_scale), nb::cast(affine), nb::cast(base)}) kept.push_back(array);
  }
};

struct PyAttention {
  AttentionShape shape;
  AttentionWeights weights;
  std::vector<In<float>> kept;

  PyAttention(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, int qk_norm, float eps, float clip,
              In<float> norm, const PyLinear& q, const PyLinear& k, const PyLinear& v, const PyLinear& o,
              std::optional<In<float>> q_norm, std::optional<In<float>> k_norm) {
    const int64_t hidden = q.linear.matrix.shape.cols;
    shape = {hidden, heads, kv_heads, head_dim, window, qk_norm, eps, clip};
    expect(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && head_dim % 2 == 0, "heads must be a multiple of kv_heads");
    const auto rows = [](const PyLinear& l) { return l.linear.matrix.shape.rows; };
    const auto cols = [](const PyLinear& l) { return l.linear.matrix.shape.cols; };
    expect(rows(q) == heads * head_dim && rows(k) == kv_heads * head_dim && rows(v) == kv_heads * head_dim &&
               cols(k) == hidden && cols(v) == hidden && rows(o) == hidden && cols(o) == heads * head_dim,
           "the shapes of q, k, v and o do not fit the heads");
    expect_size(norm, hidden, "norm");
    weights = {norm.data(), q.linear, k.linear, v.linear, o.linear, nullptr, nullptr};
    kept = {norm};
    if (qk_norm) {
      expect(q_norm && k_norm, "q_norm and k_norm are missing");
      expect_size(*q_norm, qk_norm == 1 ? head_dim : heads * head_dim, "q_norm");
      expect_size(*k_norm, qk_norm == 1 ? head_dim : kv_heads * head_dim, "k_norm");
      weights.q_norm = q_norm->data();
      weights.k_norm = k_norm->data();
      kept.push_back(*q_norm);
      kept.push_back(*k_norm);
    }
  }
};

struct PyRouter {
  RouterWeights weights;
  In<float> norm, weight;

  PyRouter(In<float> norm_, In<float> weight_, int64_t top_k, bool normalise, float eps)
      : norm(std::move(norm_)), weight(std::move(weight_)) {
    expect(weight.ndim() == 2, "the router's weight is [experts, hidden]");
    const int64_t experts = int64_t(weight.shape(0)), hidden = int64_t(weight.shape(1));
    expect_size(norm, hidden, "norm");
    expect(top_k > 0 && top_k <= experts, "top_k must be from 1 to the number of experts");
    weights = {norm.data(), weight.data(), hidden, experts, top_k, normalise, eps};
  }
};

struct PyWidths {
  WidthRouter router;
  In<float> planes;
  std::optional<In<float>> weight, base;

  PyWidths(In<float> planes_, std::optional<In<float>> weight_, std::optional<In<float>> base_, float gate_power, float norm_power)
      : planes(std::move(planes_)), weight(std::move(weight_)), base(std::move(base_)) {
    expect(planes.ndim() == 2 && planes.shape(1) == kPlanes, "planes is [experts, 6]");
    expect(!weight || (weight->ndim() == 2 && weight->shape(0) == planes.shape(0)), "weight is [experts, hidden]");
    expect(!base || (base->ndim() == 1 && base->shape(0) == planes.shape(0)), "base is [experts]");
    router = {planes.data(), weight ? weight->data() : nullptr, base ? base->data() : nullptr, gate_power, norm_power};
  }
};

void expect_rotation(int span) {
  expect(span == 0 || (span >= 16 && (span & (span - 1)) == 0), "rotation is " + std::to_string(span) + ", expected 0 or a power of two from 16 on");
}

struct PyFeedForward {
  FeedForwardWeights weights;
  std::optional<In<float>> mix, norm;

  PyFeedForward(const PyLinear& gate, const PyLinear& up, const PyLinear& down, std::optional<In<float>> mix_,
                std::optional<In<float>> norm_, float eps, int rotation)
      : mix(std::move(mix_)), norm(std::move(norm_)) {
    weights = {gate.linear, up.linear, down.linear, mix ? mix->data() : nullptr, norm ? norm->data() : nullptr, eps, rotation};
    expect_rotation(rotation);
    const auto &g = weights.gate.matrix.shape, &u = weights.up.matrix.shape, &d = weights.down.matrix.shape;
    expect(g.rows == u.rows && g.cols == u.cols && d.rows == g.cols && d.cols == g.rows, "gate, up and down do not fit");
    if (mix) expect_size(*mix, g.cols, "mix");
    if (norm) expect_size(*norm, g.cols, "norm");
  }
};

struct PyExperts {
  Executor executor;
  ExpertShape shape;

  PyExperts(Runtime& rt, int64_t layers, int64_t experts, int64_t hidden, int64_t inner, int group, int64_t base_bytes,
            int64_t plane_bytes, const std::vector<std::string>& paths, In<int64_t> offsets, In<int64_t> kept, bool direct, int depth,
            int rotation)
      : executor(rt, checked(layers, experts, hidden, inner, group, base_bytes, plane_bytes, paths, offsets, kept, rotation), paths,
                 {offsets.data(), offsets.data() + offsets.size()}, {kept.data(), kept.data() + kept.size()}, direct, depth),
        shape{layers, experts, hidden, inner, group, base_bytes, plane_bytes, rotation} {}

  static ExpertShape checked(int64_t layers, int64_t experts, int64_t hidden, int64_t inner, int group, int64_t base_bytes,
                             int64_t plane_bytes, const std::vector<std::string>& paths, const In<int64_t>& offsets,
                             const In<int64_t>& kept, int rotation) {
    expect_rotation(rotation);
    const MatrixShape wide{inner, hidden, group}, down{hidden, inner, group};
    expect(int64_t(paths.size()) == layers, "one file a layer");
    expect_size(offsets, layers * experts, "offsets");
    expect_size(kept, layers * experts, "kept");
    expect(base_bytes % kAlign == 0 && plane_bytes % kAlign == 0, "segments must be multiples of 4096 bytes");
    const auto base = [](const MatrixShape& m) { return m.affine_bytes() + m.row_scale_bytes() + m.base_bytes(); };
    expect(base_bytes >= 2 * base(wide) + base(down) &&
               plane_bytes >= 2 * wide.plane_bytes() + down.plane_bytes(),
           "segments are smaller than the matrices in them");
    for (int64_t i = 0; i < layers * experts; ++i) {
      expect(offsets.data()[i] % kAlign == 0, "records must begin at multiples of 4096 bytes");
      expect(kept.data()[i] >= kBaseBits && kept.data()[i] <= kMaxBits, "records have 2 to 8 bits");
    }
    return {layers, experts, hidden, inner, group, base_bytes, plane_bytes, rotation};
  }

  void check(int64_t layer, int64_t expert, int bits) const {
    expect(layer >= 0 && layer < shape.layers && expert >= 0 && expert < shape.experts && bits >= 0 && bits <= kMaxBits && bits != 1,
           "layer " + std::to_string(layer) + " expert " + std::to_string(expert) + " at " + std::to_string(bits) + " bits does not exist");
  }

  // moves int32 [n, 3] of layer, expert, bits.
  void evict(In<int32_t> moves) {
    each(moves, [&](const Move* m, size_t n) {
      for (size_t i = 0; i < n; ++i) executor.evict(m[i].layer, m[i].expert, m[i].bits);
    });
  }
  void cancel(In<int32_t> moves) {
    each(moves, [&](const Move* m, size_t n) {
      for (size_t i = 0; i < n; ++i) executor.cancel(m[i].layer, m[i].expert);
    });
  }
  void read(In<int32_t> moves, bool may_wait) {
    each(moves, [&](const Move* m, size_t n) { executor.read(m, n, may_wait); });
  }

  // int64 [n, 8]: kind, layer, expert, from, to, lane, begin and end in nanoseconds of the steady clock.
  auto take_events() {
    auto* kept = new std::vector<Event>(executor.take_events());
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<Event>*>(p); });
    static_assert(sizeof(Event) == 8 * sizeof(int64_t));
    return nb::ndarray<nb::numpy, int64_t, nb::c_contig>(kept->data(), {kept->size(), 8}, owner);
  }

  template <class F> void each(In<int32_t>& rows, F f) {
    expect(rows.ndim() == 2 && rows.shape(1) == 3, "moves is int32 [n, 3]: layer, expert, bits");
    static_assert(sizeof(Move) == 3 * sizeof(int32_t));
    const Move* moves = reinterpret_cast<const Move*>(rows.data());
    const size_t n = rows.shape(0);
    for (size_t i = 0; i < n; ++i) check(moves[i].layer, moves[i].expert, moves[i].bits);
    nb::gil_scoped_release free;
    f(moves, n);
  }
};

struct PyProgram {
  Array<int32_t> ids, bits;
  In<int32_t> least, most;
  In<float> price, norm;
  std::optional<Array<float>> logits; // of the step in progress
  const Executor& executor;
  Program program;
  const KvCache& kv;
  int64_t hidden;

  PyProgram(Runtime& rt, const PyLinear& embedding, const PyLinear& head, In<float> norm_, float eps,
            std::vector<float> inverse_frequency, float rope_scale, KvCache& kv, PyExperts& experts, Array<int32_t> ids_,
            Array<int32_t> bits_, In<int32_t> least_, In<int32_t> most_, In<float> price_)
      : ids(std::move(ids_)), bits(std::move(bits_)), least(std::move(least_)), most(std::move(most_)), price(std::move(price_)),
        norm(std::move(norm_)), executor(experts.executor),
        program(rt, checked(embedding, head, norm, ids, bits, kv, experts, inverse_frequency), embedding.linear, head.linear,
                norm.data(), eps, inverse_frequency, rope_scale, kv, experts.executor, ids.data(), bits.data(),
                {least.data(), most.data(), price.data()}),
        kv(kv), hidden(embedding.linear.matrix.shape.cols) {
    expect_size(least, program.shape().max_tokens, "least");
    expect_size(most, program.shape().max_tokens, "most");
    expect_size(price, program.shape().max_tokens, "price");
  }

  static ProgramShape checked(const PyLinear& embedding, const PyLinear& head, const In<float>& norm, const Array<int32_t>& ids,
                              const Array<int32_t>& bits, const KvCache& kv, const PyExperts& experts, const std::vector<float>& frequency) {
    const MatrixShape &e = embedding.linear.matrix.shape, &h = head.linear.matrix.shape;
    expect(e.cols == h.cols && e.rows == h.rows, "embedding and head differ in shape");
    expect_size(norm, h.cols, "norm");
    expect(ids.ndim() == 3 && bits.ndim() == 3, "ids and bits are [moe_layers, max_tokens, top_k]");
    for (size_t axis = 0; axis < 3; ++axis) expect(ids.shape(axis) == bits.shape(axis), "ids and bits differ in shape");
    expect(int64_t(ids.shape(0)) == experts.shape.layers && experts.shape.hidden == e.cols, "ids and experts do not fit the model");
    expect(int64_t(frequency.size()) * 2 == kv.head_dim, "inverse_frequency is [head_dim / 2]");
    return {e.cols, e.rows, int64_t(ids.shape(2)), int64_t(ids.shape(0)), int64_t(ids.shape(1))};
  }

  void add_layer(const PyAttention& attention, const PyRouter* router, const PyFeedForward* feed_forward, const PyWidths* widths) {
    expect(attention.shape.hidden == hidden && attention.shape.kv_heads == kv.kv_heads && attention.shape.head_dim == kv.head_dim,
           "the attention does not fit the model or its cache");
    expect(!router || (router->weights.hidden == hidden && router->weights.top_k == program.shape().top_k),
           "the router does not fit the model");
    if (widths)
      expect(router && widths->planes.shape(0) == size_t(router->weights.experts) &&
                 (!widths->weight || int64_t(widths->weight->shape(1)) == hidden),
             "the width router does not fit the model");
    program.add_layer(attention.shape, attention.weights, router ? std::optional(router->weights) : std::nullopt,
                      feed_forward ? std::optional(feed_forward->weights) : std::nullopt,
                      widths ? std::optional(widths->router) : std::nullopt);
  }

  void start(In<int32_t> tokens, In<int32_t> tables, In<int32_t> rows, Array<float> out) {
    expect(tokens.ndim() == 2 && tokens.shape(0) == 3, "tokens is [3, n]: id, position, row of the block table");
    const int64_t n = int64_t(tokens.shape(1));
    const int32_t *ids = tokens.data(), *position = ids + n, *sequence = position + n;
    expect(n > 0 && n <= program.shape().max_tokens, "a step has from 1 to max_tokens tokens");
    expect(tables.ndim() == 2, "tables is [sequences, blocks]");
    const int64_t sequences = int64_t(tables.shape(0)), wide = int64_t(tables.shape(1));
    for (int64_t t = 0; t < n; ++t) {
      const int64_t id = ids[t], s = sequence[t], last = position[t] / kv.block_tokens;
      expect(id >= 0 && id < program.shape().vocab, "token id " + std::to_string(id) + " is outside the vocabulary");
      expect(position[t] >= 0 && s >= 0 && s < sequences && last < wide, "a position lies outside its block table");
      const int32_t block = tables.data()[s * wide + last];
      expect(block >= 0 && block < kv.blocks, "a block table names a block that does not exist");
    }
    for (size_t i = 0; i < rows.size(); ++i)
      expect(rows.data()[i] >= 0 && rows.data()[i] < n && (!i || rows.data()[i] > rows.data()[i - 1]),
             "rows are tokens of the step, each once and ascending");
    for (int64_t t = 0; t < n; ++t)
      expect(kBaseBits <= least.data()[t] && least.data()[t] <= most.data()[t] && most.data()[t] <= kMaxBits,
             "widths are from 2 to 8, the least no more than the most");
    expect_room(out, int64_t(rows.size()) * program.shape().vocab, "out");
    logits = std::move(out);
    const TokenPlaces places{position, sequence, tables.data(), wide};
    // For a few tokens this is shorter than the wait for a GIL that another thread has taken meanwhile.
    std::optional<nb::gil_scoped_release> free;
    if (n > 32) free.emplace();
    program.start(ids, places, n, sequences, rows.data(), int64_t(rows.size()), logits->data());
  }

  int64_t run() {
    for (;;) {
      const int64_t layer = [&] {
        nb::gil_scoped_release free;
        return program.run();
      }();
      if (layer != Program::kMore) {
        if (layer < 0) logits.reset();
        return layer;
      }
      if (PyErr_CheckSignals()) throw nb::python_error(); // Ctrl-C
    }
  }

  void compute(In<int32_t> experts) {
    if (!experts.size()) return;
    nb::gil_scoped_release free;
    program.compute(experts.data(), int64_t(experts.size()));
  }

  // (first layer, ids, bits int32 [layers, tokens, top_k]) of each note.
  auto take_notes() {
    using Ids = nb::ndarray<nb::numpy, int32_t, nb::c_contig>;
    const size_t top_k = size_t(program.shape().top_k);
    std::vector<std::tuple<int64_t, Ids, Ids>> out;
    for (Program::Note& note : program.take_notes()) {
      auto* kept = new Program::Note(std::move(note));
      nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<Program::Note*>(p); });
      out.emplace_back(kept->first, Ids(kept->ids.data(), {size_t(kept->layers), size_t(kept->tokens), top_k}, owner),
                       Ids(kept->bits.data(), {size_t(kept->layers), size_t(kept->tokens), top_k}, owner));
    }
    return out;
  }

  void pause(const std::string& when) {
    using Pause = Program::Pause;
    expect(when == "missing" || when == "watch" || when == "decide", "a program pauses where experts are missing, to watch or to decide");
    program.pause(when == "missing" ? Pause::missing : when == "watch" ? Pause::watch : Pause::decide);
  }

  void choose(In<int32_t> widths, std::optional<In<float>> gates) {
    const int64_t pairs = program.waiting() * program.shape().top_k;
    expect_size(widths, pairs, "bits");
    if (gates) expect_size(*gates, pairs, "gates");
    for (int64_t i = 0; i < pairs; ++i) {
      const int32_t b = widths.data()[i];
      expect(b == 0 || (b >= kBaseBits && b <= kMaxBits), "bits are from 2 to 8, or 0");
    }
    program.choose(widths.data(), gates ? gates->data() : nullptr);
  }

  // int32 [waiting, ahead, top_k]
  auto forecast(int64_t ahead) {
    expect(ahead >= 0, "ahead is not negative");
    const size_t rows = size_t(program.waiting()), k = size_t(program.shape().top_k);
    auto* kept = new std::vector<int32_t>(rows * size_t(ahead) * k);
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
    {
      nb::gil_scoped_release free;
      program.forecast(ahead, kept->data());
    }
    return nb::ndarray<nb::numpy, int32_t, nb::c_contig>(kept->data(), {rows, size_t(ahead), k}, owner);
  }

  // A copy of float32 [waiting, cols].
  static auto copied(const float* data, int64_t rows, int64_t cols) {
    auto* kept = new std::vector<float>(data, data + rows * cols);
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    return nb::ndarray<nb::numpy, float, nb::c_contig>(kept->data(), {size_t(rows), size_t(cols)}, owner);
  }

};

} // namespace

NB_MODULE(_native, m) {
  m.doc() = "The compiled core of d2moe; import it through d2moe.kernels.native.";
  bind_kernels(m);
  bind_ledger(m);
  nb::exception<StorageFailure>(m, "StorageFailure");

  nb::class_<Runtime>(m, "Runtime")
      .def("__init__",
           [](Runtime* self, int threads, std::optional<std::string> table, int64_t scratch_bytes) {
             const KernelTable* t = table ? kernel_table(table->c_str()) : best_kernel_table();
             expect(t != nullptr, "kernel table " + table.value_or("") + " is not built or not supported by this CPU");
             new (self) Runtime(threads, t, scratch_bytes);
           },
           "threads"_a, "table"_a.none(), "scratch_bytes"_a)
      .def_prop_ro("table", [](const Runtime& r) { return std::string(r.table->name); })
      .def_prop_ro("threads", [](const Runtime& r) { return r.pool.size(); })
      .def("count_products", [](Runtime& r, bool on) { r.counting = on; r.tally.clear(); }, "on"_a)
      .def_prop_ro("products", [](const Runtime& r) {
        std::vector<std::tuple<int64_t, int64_t, int, std::string, int64_t, int64_t>> out;
        for (const auto& [key, n] : r.tally)
          out.emplace_back(std::get<0>(key), std::get<1>(key), std::get<2>(key), std::get<3>(key), n.first, n.second);
        return out;
      }, "(rows, columns, bits, way, products, tokens) of the matrix products since count_products(True).");
  nb::class_<PyLinear>(m, "Linear")
      .def(nb::init<int64_t, int64_t, int, int, In<float>, In<uint8_t>, In<uint8_t>, const std::vector<In<uint8_t>>&, std::optional<In<float>>>(),
           "rows"_a, "cols"_a, "group"_a, "bits"_a, "row_scale"_a, "affine"_a, "base"_a, "planes"_a, "bias"_a.none());
  nb::class_<KvCache>(m, "KvCache")
      .def("__init__", [](KvCache* self, const std::string& type, int64_t layers, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim) {
             expect(type == "f16" || type == "q8", "a cache is of type f16 or q8");
             new (self) KvCache(type == "q8" ? KvType::q8 : KvType::f16, layers, blocks, block_tokens, kv_heads, head_dim);
           }, "type"_a, "layers"_a, "blocks"_a, "block_tokens"_a, "kv_heads"_a, "head_dim"_a);
  nb::class_<PyAttention>(m, "Attention")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int, float, float, In<float>, const PyLinear&, const PyLinear&,
                    const PyLinear&, const PyLinear&, std::optional<In<float>>, std::optional<In<float>>>(),
           nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>(), nb::keep_alive<1, 13>(), "heads"_a,
           "kv_heads"_a, "head_dim"_a, "window"_a, "qk_norm"_a, "eps"_a, "clip"_a, "norm"_a, "q"_a, "k"_a, "v"_a, "o"_a,
           "q_norm"_a.none(), "k_norm"_a.none());
  nb::class_<PyRouter>(m, "Router")
      .def(nb::init<In<float>, In<float>, int64_t, bool, float>(), "norm"_a, "weight"_a, "top_k"_a, "normalise"_a, "eps"_a);
  nb::class_<PyWidths>(m, "WidthRouter")
      .def(nb::init<In<float>, std::optional<In<float>>, std::optional<In<float>>, float, float>(), "planes"_a, "weight"_a.none(),
           "base"_a.none(), "gate_power"_a, "norm_power"_a);
  nb::class_<PyFeedForward>(m, "FeedForward")
      .def(nb::init<const PyLinear&, const PyLinear&, const PyLinear&, std::optional<In<float>>, std::optional<In<float>>, float, int>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), "gate"_a, "up"_a, "down"_a, "mix"_a.none(),
           "norm"_a.none(), "eps"_a, "rotation"_a = 0);
  nb::class_<PyExperts>(m, "Experts")
      .def(nb::init<Runtime&, int64_t, int64_t, int64_t, int64_t, int, int64_t, int64_t, const std::vector<std::string>&,
                    In<int64_t>, In<int64_t>, bool, int, int>(),
           nb::keep_alive<1, 2>(), "runtime"_a, "layers"_a, "experts"_a, "hidden"_a, "inner"_a, "group"_a, "base_bytes"_a,
           "plane_bytes"_a, "paths"_a, "offsets"_a, "kept"_a, "direct"_a, "depth"_a, "rotation"_a = 0)
      .def("set_limit", [](PyExperts& e, int64_t bytes) { e.executor.set_limit(bytes); })
      .def("width", [](const PyExperts& e, int64_t layer, int64_t expert) {
        e.check(layer, expert, 2);
        return e.executor.width(layer, expert);
      })
      .def("evict", &PyExperts::evict)
      .def("cancel", &PyExperts::cancel)
      .def("read", &PyExperts::read, "moves"_a, "may_wait"_a = false)
      .def("abandon", [](PyExperts& e) { e.executor.abandon(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("log", [](PyExperts& e, bool on) { e.executor.log(on); }, "on"_a)
      .def("take_events", &PyExperts::take_events)
      .def_prop_ro("direct", [](const PyExperts& e) { return e.executor.direct(); })
      .def_prop_ro("depth", [](const PyExperts& e) { return e.executor.depth(); }, "Reader threads that could be started.");
  nb::class_<PyProgram>(m, "Program")
      .def(nb::init<Runtime&, const PyLinear&, const PyLinear&, In<float>, float, std::vector<float>, float, KvCache&, PyExperts&,
                    Array<int32_t>, Array<int32_t>, In<int32_t>, In<int32_t>, In<float>>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(),
           "runtime"_a, "embedding"_a, "head"_a, "norm"_a, "eps"_a, "inverse_frequency"_a, "rope_scale"_a, "kv"_a, "experts"_a,
           "ids"_a, "bits"_a, "least"_a, "most"_a, "price"_a)
      .def("add_layer", &PyProgram::add_layer, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>(), "attention"_a, "router"_a.none(), "feed_forward"_a.none(), "widths"_a.none())
      .def("start", &PyProgram::start)
      .def("run", &PyProgram::run)
      .def("compute", &PyProgram::compute)
      .def("take_notes", &PyProgram::take_notes)
      .def_prop_ro("planned", [](const PyProgram& p) { return p.program.planned(); }, "Layer calls that take_planned would tell of.")
      .def("plan_by", [](PyProgram& p, Ledger* ledger) { p.program.plan_by(ledger); }, nb::keep_alive<1, 2>(), "ledger"_a.none())
      .def("take_planned", [](PyProgram& p) {
        const Program::Planned found = p.program.take_planned();
        return std::make_tuple(found.plans, found.missing_bytes, found.decide_ns, found.read);
      }, "What the ledger planned since the last call: layer calls, bytes missing, nanoseconds, planes read by width.")
      .def("pause", &PyProgram::pause, "when"_a)
      .def("choose", &PyProgram::choose, "bits"_a, "gates"_a.none() = nb::none())
      .def("forecast", &PyProgram::forecast, "ahead"_a)
      .def_prop_ro("held", [](const PyProgram& p) { return p.program.held(); })
      .def_prop_ro("gates", [](const PyProgram& p) { return p.copied(p.program.gates(), p.program.waiting(), p.program.shape().top_k); }, nb::rv_policy::automatic)
      .def("abandon", [](PyProgram& p) { p.program.abandon(); }, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("counts", [](const PyProgram& p) {
        const ExecutorCounters& c = p.executor.counters();
        const auto tuple = [](const WidthCounts& w) { return std::apply([](auto... n) { return nb::make_tuple(n...); }, w); };
        return nb::make_tuple(p.program.taken(), c.read_bytes, c.reads, c.stall_ns, c.compute_ns, tuple(p.program.used()), tuple(p.program.planes_wanted()));
      }, "(token, expert) pairs and the sum of their widths for each sequence of the last step; and of all steps bytes read, reads, nanoseconds "
         "of waiting and of arithmetic, pairs by width, planes wanted by the width that each makes.")
      .def_prop_ro("busy_ns", [](const PyProgram& p) { return p.program.busy_ns(); });
}
