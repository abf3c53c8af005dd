// The only file, with bindings_kernels.cpp, that knows Python: arrays are checked here, the GIL is released here.
#include "dense.h"
#include "executor.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;
using namespace nb::literals;
using namespace d2moe;

void bind_kernels(nb::module_& m);

namespace {

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T> using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

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
  In<uint8_t> codes;
  In<uint16_t> affine;
  std::optional<In<float>> bias;

  PyLinear(int64_t rows, int64_t cols, int group, In<uint8_t> codes_, In<uint16_t> affine_,
           std::optional<In<float>> bias_)
      : codes(std::move(codes_)), affine(std::move(affine_)), bias(std::move(bias_)) {
    expect(rows > 0 && cols > 0 && group > 0 && group % 32 == 0 && group <= 256, "a linear layer has rows, columns and a group");
    linear.matrix.shape = {rows, cols, group};
    expect_size(codes, linear.matrix.shape.flat_bytes(), "codes");
    expect_size(affine, linear.matrix.shape.affine_bytes() / 2, "affine");
    if (bias) expect_size(*bias, rows, "bias");
    linear.matrix.flat = codes.data();
    linear.matrix.affine = affine.data();
    linear.bias = bias ? bias->data() : nullptr;
  }
};

struct PyAttention {
  Runtime& rt;
  AttentionShape shape;
  AttentionWeights weights;
  std::vector<In<float>> kept;

  PyAttention(Runtime& rt, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, int qk_norm, float eps,
              float clip, float rope_scale, In<float> norm, const PyLinear& q, const PyLinear& k, const PyLinear& v,
              const PyLinear& o, std::optional<In<float>> q_norm, std::optional<In<float>> k_norm,
              In<float> inverse_frequency)
      : rt(rt) {
    const int64_t hidden = q.linear.matrix.shape.cols;
    shape = {hidden, heads, kv_heads, head_dim, window, qk_norm, eps, clip, rope_scale};
    expect(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && head_dim % 2 == 0, "heads must be a multiple of kv_heads");
    const auto rows = [](const PyLinear& l) { return l.linear.matrix.shape.rows; };
    const auto cols = [](const PyLinear& l) { return l.linear.matrix.shape.cols; };
    expect(rows(q) == heads * head_dim && rows(k) == kv_heads * head_dim && rows(v) == kv_heads * head_dim &&
               cols(k) == hidden && cols(v) == hidden && rows(o) == hidden && cols(o) == heads * head_dim,
           "the shapes of q, k, v and o do not fit the heads");
    expect_size(norm, hidden, "norm");
    expect_size(inverse_frequency, head_dim / 2, "inverse_frequency");
    weights = {norm.data(), q.linear, k.linear, v.linear, o.linear, nullptr, nullptr, inverse_frequency.data()};
    kept = {norm, inverse_frequency};
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

  void forward(KvCache& kv, int64_t layer, In<int32_t> position, In<int32_t> sequence, In<int32_t> tables, Array<float> x) {
    const int64_t tokens = int64_t(position.size());
    expect_size(sequence, tokens, "sequence");
    expect_room(x, tokens * shape.hidden, "x");
    expect(tables.ndim() == 2, "tables is [sequences, blocks]");
    expect(layer >= 0 && layer < kv.layers && kv.kv_heads == shape.kv_heads && kv.head_dim == shape.head_dim,
           "the cache does not fit the layer");
    const int64_t wide = int64_t(tables.shape(1));
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t s = sequence.data()[t], last = position.data()[t] / kv.block_tokens;
      expect(position.data()[t] >= 0 && s >= 0 && s < int64_t(tables.shape(0)) && last < wide, "a position lies outside its block table");
      const int32_t block = tables.data()[s * wide + last];
      expect(block >= 0 && block < kv.blocks, "a block table names a block that does not exist");
    }
    const TokenPlaces places{position.data(), sequence.data(), tables.data(), wide};
    float* data = x.data();
    nb::gil_scoped_release free;
    attention(rt, shape, weights, kv, layer, places, tokens, data);
  }
};

struct PyRouter {
  Runtime& rt;
  In<float> norm, weight;
  int64_t experts, hidden, top_k;
  bool normalise;
  float eps;

  PyRouter(Runtime& rt, In<float> norm_, In<float> weight_, int64_t top_k, bool normalise, float eps)
      : rt(rt), norm(std::move(norm_)), weight(std::move(weight_)), top_k(top_k), normalise(normalise), eps(eps) {
    expect(weight.ndim() == 2, "the router's weight is [experts, hidden]");
    experts = int64_t(weight.shape(0));
    hidden = int64_t(weight.shape(1));
    expect_size(norm, hidden, "norm");
    expect(top_k > 0 && top_k <= experts, "top_k must be from 1 to the number of experts");
  }

  void forward(int64_t tokens, In<float> x, Array<float> h, Array<int32_t> ids, Array<float> gates) {
    expect_room(x, tokens * hidden, "x");
    expect_room(h, tokens * hidden, "h");
    expect_room(ids, tokens * top_k, "ids");
    expect_room(gates, tokens * top_k, "gates");
    nb::gil_scoped_release free;
    route(rt, norm.data(), weight.data(), hidden, experts, top_k, normalise, eps, tokens, x.data(), h.data(), ids.data(), gates.data());
  }
};

struct PyFeedForward {
  Runtime& rt;
  Linear gate, up, down;
  std::optional<In<float>> mix, norm;
  float eps;

  PyFeedForward(Runtime& rt, const PyLinear& gate, const PyLinear& up, const PyLinear& down, std::optional<In<float>> mix_,
                std::optional<In<float>> norm_, float eps)
      : rt(rt), gate(gate.linear), up(up.linear), down(down.linear), mix(std::move(mix_)), norm(std::move(norm_)), eps(eps) {
    const auto &g = this->gate.matrix.shape, &u = this->up.matrix.shape, &d = this->down.matrix.shape;
    expect(g.rows == u.rows && g.cols == u.cols && d.rows == g.cols && d.cols == g.rows, "gate, up and down do not fit");
    if (mix) expect_size(*mix, g.cols, "mix");
    if (norm) expect_size(*norm, g.cols, "norm");
  }

  // h is the normed input; where this block has a norm of its own, h is computed here from x.
  void forward(int64_t tokens, Array<float> h, Array<float> x) {
    const int64_t hidden = gate.matrix.shape.cols;
    expect_room(h, tokens * hidden, "h");
    expect_room(x, tokens * hidden, "x");
    nb::gil_scoped_release free;
    if (norm)
      for (int64_t t = 0; t < tokens; ++t)
        rms_norm(*rt.table, x.data() + t * hidden, norm->data(), eps, hidden, h.data() + t * hidden);
    feed_forward(rt, gate, up, down, mix ? mix->data() : nullptr, tokens, h.data(), x.data());
  }
};

struct PyEnds { // embedding and head
  Runtime& rt;
  Linear embedding, head;
  In<float> norm;
  float eps;

  PyEnds(Runtime& rt, const PyLinear& embedding, const PyLinear& head, In<float> norm_, float eps)
      : rt(rt), embedding(embedding.linear), head(head.linear), norm(std::move(norm_)), eps(eps) {
    expect(this->embedding.matrix.shape.cols == this->head.matrix.shape.cols, "embedding and head differ in width");
    expect_size(norm, this->head.matrix.shape.cols, "norm");
  }

  void embed_tokens(In<int32_t> ids, Array<float> x) {
    const Matrix& m = embedding.matrix;
    expect_room(x, int64_t(ids.size()) * m.shape.cols, "x");
    for (size_t i = 0; i < ids.size(); ++i)
      expect(ids.data()[i] >= 0 && ids.data()[i] < m.shape.rows, "token id " + std::to_string(ids.data()[i]) + " is outside the vocabulary");
    nb::gil_scoped_release free;
    embed(rt, m, ids.data(), int64_t(ids.size()), x.data());
  }

  void logits(int64_t tokens, In<float> x, Array<float> out) {
    expect_room(x, tokens * head.matrix.shape.cols, "x");
    expect_room(out, tokens * head.matrix.shape.rows, "out");
    nb::gil_scoped_release free;
    project(rt, norm.data(), eps, head, tokens, x.data(), out.data());
  }
};

struct PyExperts {
  Executor executor;
  ExpertShape shape;

  PyExperts(Runtime& rt, int64_t layers, int64_t experts, int64_t hidden, int64_t inner, int group, int64_t base_bytes,
            int64_t plane_bytes, const std::vector<std::string>& paths, std::vector<int64_t> offsets, bool direct, int depth)
      : executor(rt, checked(layers, experts, hidden, inner, group, base_bytes, plane_bytes, paths, offsets), paths,
                 offsets, direct, depth),
        shape{layers, experts, hidden, inner, group, base_bytes, plane_bytes} {}

  static ExpertShape checked(int64_t layers, int64_t experts, int64_t hidden, int64_t inner, int group, int64_t base_bytes,
                             int64_t plane_bytes, const std::vector<std::string>& paths, const std::vector<int64_t>& offsets) {
    const MatrixShape wide{inner, hidden, group}, down{hidden, inner, group};
    expect(int64_t(paths.size()) == layers && int64_t(offsets.size()) == layers, "one file and one offset a layer");
    expect(base_bytes % kAlign == 0 && plane_bytes % kAlign == 0, "segments must be multiples of 4096 bytes");
    expect(base_bytes >= 2 * (wide.affine_bytes() + wide.base_bytes()) + down.affine_bytes() + down.base_bytes() &&
               plane_bytes >= 2 * wide.plane_bytes() + down.plane_bytes(),
           "segments are smaller than the matrices in them");
    for (int64_t o : offsets) expect(o % kAlign == 0, "records must begin at multiples of 4096 bytes");
    return {layers, experts, hidden, inner, group, base_bytes, plane_bytes};
  }

  void check(int64_t layer, int64_t expert, int bits) const {
    expect(layer >= 0 && layer < shape.layers && expert >= 0 && expert < shape.experts && bits >= 0 && bits <= kMaxBits && bits != 1,
           "layer " + std::to_string(layer) + " expert " + std::to_string(expert) + " at " + std::to_string(bits) + " bits does not exist");
  }

  // moves int32 [n, 3] of layer, expert, bits.
  void evict(In<int32_t> moves) { each(moves, [&](int64_t l, int64_t e, int b) { executor.evict(l, e, b); }); }
  void read(In<int32_t> moves) { each(moves, [&](int64_t l, int64_t e, int b) { executor.read(l, e, b); }); }

  template <class F> void each(In<int32_t>& moves, F f) {
    expect(moves.ndim() == 2 && moves.shape(1) == 3, "moves is int32 [n, 3]: layer, expert, bits");
    const int32_t* p = moves.data();
    for (size_t i = 0; i < moves.shape(0); ++i, p += 3) check(p[0], p[1], p[2]);
    p = moves.data();
    nb::gil_scoped_release free;
    for (size_t i = 0; i < moves.shape(0); ++i, p += 3) f(p[0], p[1], p[2]);
  }

  void begin(int64_t layer, int64_t tokens, int64_t top_k, In<float> h, In<int32_t> ids, In<int32_t> bits) {
    check(layer, 0, 2);
    expect_room(h, tokens * shape.hidden, "h");
    expect_room(ids, tokens * top_k, "ids");
    expect_room(bits, tokens * top_k, "bits");
    nb::gil_scoped_release free;
    executor.begin(layer, tokens, top_k, h.data(), ids.data(), bits.data());
  }

  void compute(std::optional<In<int32_t>> experts) {
    const int64_t n = experts ? int64_t(experts->size()) : 0;
    const int32_t* p = n ? experts->data() : nullptr;
    for (int64_t i = 0; i < n; ++i) check(0, p[i], 2);
    if (experts && !n) return;
    nb::gil_scoped_release free;
    executor.compute(p, n);
  }

  void finish(int64_t tokens, int64_t top_k, In<float> gates, Array<float> x) {
    expect_room(gates, tokens * top_k, "gates");
    expect_room(x, tokens * shape.hidden, "x");
    nb::gil_scoped_release free;
    executor.finish(gates.data(), x.data());
  }
};

} // namespace

NB_MODULE(_native, m) {
  m.doc() = "The compiled core of d2moe; import it through d2moe.kernels.native.";
  bind_kernels(m);
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
      .def_prop_ro("threads", [](const Runtime& r) { return r.pool.size(); });
  nb::class_<PyLinear>(m, "Linear")
      .def(nb::init<int64_t, int64_t, int, In<uint8_t>, In<uint16_t>, std::optional<In<float>>>(), "rows"_a, "cols"_a,
           "group"_a, "codes"_a, "affine"_a, "bias"_a.none());
  nb::class_<KvCache>(m, "KvCache")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t>(), "layers"_a, "blocks"_a, "block_tokens"_a, "kv_heads"_a, "head_dim"_a)
      .def("release", [](KvCache& kv, int64_t block) {
        expect(block >= 0 && block < kv.blocks, "no such block");
        kv.release(block);
      });
  nb::class_<PyAttention>(m, "Attention")
      .def(nb::init<Runtime&, int64_t, int64_t, int64_t, int64_t, int, float, float, float, In<float>, const PyLinear&,
                    const PyLinear&, const PyLinear&, const PyLinear&, std::optional<In<float>>, std::optional<In<float>>, In<float>>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 12>(), nb::keep_alive<1, 13>(), nb::keep_alive<1, 14>(), nb::keep_alive<1, 15>(),
           "runtime"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "window"_a, "qk_norm"_a, "eps"_a, "clip"_a, "rope_scale"_a,
           "norm"_a, "q"_a, "k"_a, "v"_a, "o"_a, "q_norm"_a.none(), "k_norm"_a.none(), "inverse_frequency"_a)
      .def("forward", &PyAttention::forward);
  nb::class_<PyRouter>(m, "Router")
      .def(nb::init<Runtime&, In<float>, In<float>, int64_t, bool, float>(), nb::keep_alive<1, 2>(), "runtime"_a, "norm"_a,
           "weight"_a, "top_k"_a, "normalise"_a, "eps"_a)
      .def("forward", &PyRouter::forward);
  nb::class_<PyFeedForward>(m, "FeedForward")
      .def(nb::init<Runtime&, const PyLinear&, const PyLinear&, const PyLinear&, std::optional<In<float>>, std::optional<In<float>>, float>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), "runtime"_a,
           "gate"_a, "up"_a, "down"_a, "mix"_a.none(), "norm"_a.none(), "eps"_a)
      .def("forward", &PyFeedForward::forward);
  nb::class_<PyEnds>(m, "Ends")
      .def(nb::init<Runtime&, const PyLinear&, const PyLinear&, In<float>, float>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), "runtime"_a, "embedding"_a, "head"_a, "norm"_a, "eps"_a)
      .def("embed", &PyEnds::embed_tokens)
      .def("logits", &PyEnds::logits);
  nb::class_<PyExperts>(m, "Experts")
      .def(nb::init<Runtime&, int64_t, int64_t, int64_t, int64_t, int, int64_t, int64_t, const std::vector<std::string>&,
                    std::vector<int64_t>, bool, int>(),
           nb::keep_alive<1, 2>(), "runtime"_a, "layers"_a, "experts"_a, "hidden"_a, "inner"_a, "group"_a, "base_bytes"_a,
           "plane_bytes"_a, "paths"_a, "offsets"_a, "direct"_a, "depth"_a)
      .def("set_limit", [](PyExperts& e, int64_t bytes) { e.executor.set_limit(bytes); })
      .def("width", [](PyExperts& e, int64_t l, int64_t i) { e.check(l, i, 2); return e.executor.width(l, i); })
      .def("evict", &PyExperts::evict)
      .def("read", &PyExperts::read)
      .def("begin", &PyExperts::begin)
      .def("compute", &PyExperts::compute, "experts"_a.none())
      .def("finish", &PyExperts::finish)
      .def("abandon", [](PyExperts& e) { nb::gil_scoped_release free; e.executor.abandon(); })
      .def_prop_ro("direct", [](const PyExperts& e) { return e.executor.direct(); })
      // read_bytes, reads, stall_ns, compute_ns, calls
      .def_prop_ro("counters", [](const PyExperts& e) {
        const ExecutorCounters& c = e.executor.counters();
        return std::make_tuple(c.read_bytes, c.reads, c.stall_ns, c.compute_ns, c.calls);
      });
}
