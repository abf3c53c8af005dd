// Rotation of what down projections meet; planes.rotate in d2moe/planes.py is the definition, bit for bit.
#pragma once
#include <cstdint>

namespace d2moe {

// Every whole span of x[n] becomes its Walsh-Hadamard transform, sums and differences without a factor; the last n % span numbers stay.
// `span` is a power of two of at least 16.
void rotate(float* x, int64_t n, int span);

} // namespace d2moe
