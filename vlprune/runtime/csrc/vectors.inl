// The vector types of a kernel set, for the W floats that the file which includes this defines before, in an unnamed
// namespace.

typedef float F __attribute__((vector_size(4 * W)));
typedef float FU __attribute__((vector_size(4 * W), aligned(1), may_alias));  // at any address
typedef int32_t I __attribute__((vector_size(4 * W), may_alias));
using Lanes = std::make_integer_sequence<int, W>;
