// The ledger as Python sees it, d2moe.policy.ledger.
#include "bindings.h"
#include "ledger.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>

using namespace d2moe;

namespace {

void expect_calls(const Ledger& l, int64_t first, int64_t count, const In<int32_t>& ids, const In<int32_t>& bits) {
  expect(first >= 0 && first + count <= l.layers,
         "calls of layers " + std::to_string(first) + " to " + std::to_string(first + count) + " of " + std::to_string(l.layers));
  expect(ids.ndim() == bits.ndim(), "ids and bits differ in shape");
  for (size_t i = 0; i < ids.ndim(); ++i) expect(ids.shape(i) == bits.shape(i), "ids and bits differ in shape");
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t id = ids.data()[i], b = bits.data()[i];
    expect(id >= 0 && id < l.experts && (b == 0 || (b >= kBaseBits && b <= kMaxBits)),
           "expert " + std::to_string(id) + " at " + std::to_string(b) + " bits does not exist");
  }
}

void touch(Ledger& l, int64_t first, In<int32_t> ids, In<int32_t> bits) {
  expect(ids.ndim() == 3 && ids.shape(1) > 0, "ids is [layers, tokens, top_k]");
  expect_calls(l, first, int64_t(ids.shape(0)), ids, bits);
  l.touch(first, int64_t(ids.shape(0)), int64_t(ids.shape(1)), int64_t(ids.shape(2)), ids.data(), bits.data());
}

void set(Ledger& l, int64_t layer, int64_t expert, int bits) {
  expect(layer >= 0 && layer < l.layers && expert >= 0 && expert < l.experts && bits >= 0 && bits <= kMaxBits && bits != 1,
         "layer " + std::to_string(layer) + " expert " + std::to_string(expert) + " at " + std::to_string(bits) + " bits does not exist");
  l.set(layer, expert, bits);
}

template <class T> Out<T> given(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return Out<T>(kept->data(), {kept->size()}, owner);
}

// i32 [n, 3]
Out<int32_t> rows(std::vector<Move> moves) {
  static_assert(sizeof(Move) == 3 * sizeof(int32_t));
  auto* kept = new std::vector<Move>(std::move(moves));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<Move>*>(p); });
  return Out<int32_t>(reinterpret_cast<int32_t*>(kept->data()), {kept->size(), 3}, owner);
}

std::optional<Out<int32_t>> make_room(Ledger& l, int64_t n_bytes, int64_t layer, const std::vector<int64_t>& pinned) {
  expect(layer >= 0 && layer < l.layers, "layer " + std::to_string(layer) + " of " + std::to_string(l.layers));
  std::vector<uint8_t> stays(size_t(l.experts), 0);
  for (int64_t e : pinned) {
    expect(e >= 0 && e < l.experts, "expert " + std::to_string(e) + " of " + std::to_string(l.experts));
    stays[size_t(e)] = 1;
  }
  std::vector<Move> gone;
  if (!l.make_room(n_bytes, layer, stays.data(), gone)) return std::nullopt;
  return rows(std::move(gone));
}

auto plan(Ledger& l, int64_t layer, In<int32_t> ids, In<int32_t> bits, In<int32_t> asked) {
  expect(ids.ndim() == 2 && ids.shape(0) > 0, "ids is [tokens, top_k]");
  expect_calls(l, layer, 1, ids, bits);
  expect_calls(l, layer, 1, ids, asked);
  std::vector<std::tuple<Out<int32_t>, Out<int32_t>, Out<int32_t>, int64_t>> out;
  for (Wave& wave : l.plan(layer, int64_t(ids.shape(0)), int64_t(ids.shape(1)), ids.data(), bits.data(), asked.data()))
    out.emplace_back(rows(std::move(wave.evict)), rows(std::move(wave.read)), given(std::move(wave.experts)), wave.read_bytes);
  return out;
}

} // namespace

void bind_ledger(nb::module_& m) {
  nb::exception<NoRoom>(m, "NoRoom", nb::module_::import_("d2moe.errors").attr("MemoryBudgetError").ptr());
  nb::class_<Ledger>(m, "Ledger")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, double, double>(), "layers"_a, "experts"_a, "base_bytes"_a, "plane_bytes"_a,
           "limit_bytes"_a, "fade"_a, "last_call"_a)
      .def("touch", &touch, "first_layer"_a, "ids"_a, "bits"_a)
      .def("value", [](Ledger& l) { l.value(); })
      .def("set", &set, "layer"_a, "expert"_a, "bits"_a)
      .def("make_room", &make_room, "n_bytes"_a, "pinned_layer"_a, "pinned"_a, "int32 [n, 3] of layer, expert, bits that stay, or None.")
      .def("plan", &plan, "layer"_a, "ids"_a, "bits"_a, "asked"_a, "(evict, read, experts, bytes to read) of each wave, see d2moe.policy.hebf.")
      .def_ro("used_bytes", &Ledger::used_bytes)
      .def_rw("limit_bytes", &Ledger::limit_bytes)
      .def_rw("turn", &Ledger::turn)
      .def_prop_ro("width", [](nb::handle self) {
        Ledger& l = nb::cast<Ledger&>(self);
        return Out<int32_t>(l.width.data(), {size_t(l.layers), size_t(l.experts)}, self);
      }, nb::rv_policy::reference)
      .def_prop_ro("demand", [](nb::handle self) {
        Ledger& l = nb::cast<Ledger&>(self);
        return Out<double>(l.demand.data(), {size_t(l.layers), size_t(l.experts), size_t(kSegments)}, self);
      }, nb::rv_policy::reference, "Decayed numbers of tokens that wanted each plane, float64 [layers, experts, 7].")
      .def_prop_ro("tokens", [](nb::handle self) {
        Ledger& l = nb::cast<Ledger&>(self);
        return Out<double>(l.tokens_seen.data(), {size_t(l.layers)}, self);
      }, nb::rv_policy::reference, "And of all, float64 [layers].");
}
