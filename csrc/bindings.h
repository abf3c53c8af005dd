// What the three files that know Python share: arrays as they come and go, and the check of what came.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

void bind_kernels(nb::module_& m);
void bind_ledger(nb::module_& m);

namespace {

template <class T> using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T> using Out = nb::ndarray<nb::numpy, T, nb::c_contig, nb::device::cpu>;

inline void expect(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

} // namespace
