// The operators as ONNX Runtime sees them: what they are called and take, everything that is checked, and nothing that is
// computed. docs/sparse.md describes the operators and the layout of the weights.
//
// A node is checked when its session is created: from then on its weights are known to be sound, and only the shapes of
// its other inputs are looked at when it runs. Exceptions do not leave this file.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

#if defined(_WIN32)
#define VLPRUNE_EXPORT extern "C" __declspec(dllexport)
#else
#define VLPRUNE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#ifndef VLPRUNE_VERSION
#define VLPRUNE_VERSION "unknown"
#endif

namespace vlprune {
namespace {

using namespace ort;

// --- errors: thrown inside, a status outside -------------------------------------------------------------------------

struct Refusal {
  int code;
  std::string text;
};

[[noreturn]] __attribute__((format(printf, 2, 3))) void refuse(int code, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Refusal{code, text};
}

// A status of ONNX Runtime's own becomes an exception that carries it, to be handed back as it is.
struct Failed {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Failed{status};
}

// For calls whose failure is an answer.
bool succeeds(const OrtApi* api, OrtStatus* status) {
  if (status) ReleaseStatus(api, status);
  return !status;
}

// Runs `body`; whatever it throws becomes a status that begins with the name of the node.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const char* who, const Body& body) noexcept {
  const char* what;
  int code = kRuntimeException;
  std::string text;
  try {
    try {
      body();
      return nullptr;
    } catch (const Refusal& refusal) {
      code = refusal.code;
      text = std::string(who) + ": " + refusal.text;
      what = text.c_str();
    } catch (const Failed& failed) {
      return failed.status;
    } catch (const std::bad_alloc&) {
      text = std::string(who) + ": failed to allocate memory";
      what = text.c_str();
    }
  } catch (...) {
    what = "vlprune: failed to allocate memory for a message";
  }
  return CreateStatus(api, code, what);
}

// --- sizes -----------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) refuse(kInvalidArgument, "sizes overflow 64 bits");
  return product;
}

constexpr size_t kMostDimensions = 16;  // no tensor has more here, so that shapes need no allocation

struct Shape {
  int64_t dims[kMostDimensions];
  size_t rank;

  int64_t last() const { return dims[rank - 1]; }

  std::string text() const {
    std::string text = "[";
    for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
  }

  bool operator==(const Shape& other) const {
    return rank == other.rank && std::memcmp(dims, other.dims, rank * sizeof *dims) == 0;
  }
};

struct Info {
  const OrtApi* api;
  OrtTensorTypeAndShapeInfo* info = nullptr;

  Info(const OrtApi* api) : api(api) {}
  Info(const Info&) = delete;
  Info& operator=(const Info&) = delete;
  ~Info() {
    if (info) ReleaseTensorTypeAndShapeInfo(api, info);
  }
};

Shape shape_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, const char* name) {
  Shape shape;
  check(GetDimensionsCount(api, info, &shape.rank));
  if (shape.rank > kMostDimensions) refuse(kInvalidArgument, "%s has %zu dimensions", name, shape.rank);
  check(GetDimensions(api, info, shape.dims, shape.rank));
  return shape;
}

struct Tensor {
  const void* data = nullptr;
  int type = kAny;
  Shape shape{};

  const float* floats() const { return static_cast<const float*>(data); }
};

Tensor tensor_of(const OrtApi* api, const OrtValue* value, const char* name) {
  Info info(api);
  check(GetTensorTypeAndShape(api, value, &info.info));
  Tensor tensor;
  check(GetTensorElementType(api, info.info, &tensor.type));
  tensor.shape = shape_of(api, info.info, name);
  void* data = nullptr;
  check(GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

const char* type_name(int type) {
  switch (type) {
    case kFloat: return "float32";
    case kUint8: return "uint8";
    case kUint16: return "uint16";
    case kFloat16: return "float16";
    default: return "another type";
  }
}

// --- a node, while its kernel is made --------------------------------------------------------------------------------

class Node {
 public:
  Node(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {
    check(KernelInfo_GetInputCount(api, info, &inputs_));
  }

  bool has(size_t index) const {
    if (index >= inputs_) return false;
    size_t size = 0;  // of the name, with its closing zero: an input that is left out has an empty one
    check(KernelInfo_GetInputName(api_, info_, index, nullptr, &size));
    return size > 1;
  }

  Tensor constant(size_t index, const char* name, int type, int other_type = kAny, size_t rank = 1) const {
    if (!has(index)) refuse(kInvalidGraph, "input %s is missing", name);
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(KernelInfoGetConstantInput_tensor(api_, info_, index, &is_constant, &value));
    // Also null with success: a weight of an outer graph, in ONNX Runtime 1.17.
    if (!is_constant || !value)
      refuse(kInvalidGraph, "input %s must be a constant of the graph (an initializer that is no graph input)", name);
    Tensor tensor = tensor_of(api_, value, name);
    if (tensor.type != type && (other_type == kAny || tensor.type != other_type))
      refuse(kInvalidGraph, "input %s is %s, must be %s%s%s", name, type_name(tensor.type), type_name(type),
             other_type == kAny ? "" : " or ", other_type == kAny ? "" : type_name(other_type));
    if (tensor.shape.rank != rank)
      refuse(kInvalidGraph, "input %s has shape %s, must have %s", name, tensor.shape.text().c_str(),
             rank == 1 ? "one dimension" : "two dimensions");
    return tensor;
  }

  int64_t integer(const char* name, int64_t least, int64_t most) const {
    int64_t value = 0;
    if (!succeeds(api_, KernelInfoGetAttribute_int64(api_, info_, name, &value)))
      refuse(kInvalidGraph, "attribute %s is missing or not an int", name);
    if (value < least || value > most)
      refuse(kInvalidGraph, "attribute %s is %lld, must be %lld to %lld", name, static_cast<long long>(value),
             static_cast<long long>(least), static_cast<long long>(most));
    return value;
  }

  bool flag(const char* name) const {
    int64_t value = 0;
    return succeeds(api_, KernelInfoGetAttribute_int64(api_, info_, name, &value)) && integer(name, 0, 1);
  }

  float number(const char* name) const {
    float value = 0;
    if (!succeeds(api_, KernelInfoGetAttribute_float(api_, info_, name, &value)))
      refuse(kInvalidGraph, "attribute %s is missing or not a float", name);
    if (!std::isfinite(value)) refuse(kInvalidGraph, "attribute %s is not finite", name);
    return value;
  }

  std::string text(const char* name) const {
    char value[64];
    size_t size = 0;
    if (!succeeds(api_, KernelInfoGetAttribute_string(api_, info_, name, nullptr, &size)))
      refuse(kInvalidGraph, "attribute %s is missing or not a string", name);
    if (size > sizeof value) refuse(kInvalidGraph, "attribute %s is too long", name);
    check(KernelInfoGetAttribute_string(api_, info_, name, value, &size));
    return std::string(value, size ? size - 1 : 0);  // with any zero inside: such a text is not "gelu"
  }

 private:
  const OrtApi* api_;
  const OrtKernelInfo* info_;
  size_t inputs_ = 0;
};

// "vlprune.SparseLinear node 'name'", as every message begins.
std::string who(const OrtApi* api, const OrtKernelInfo* info, const char* op) {
  char name[256];
  size_t size = sizeof name;
  if (!succeeds(api, KernelInfo_GetNodeName(api, info, name, &size))) std::strcpy(name, "?");
  return std::string("vlprune.") + op + " node '" + name + "'";
}

// --- a node, while it runs -------------------------------------------------------------------------------------------

class Run {
 public:
  Run(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {
    check(KernelContext_GetInputCount(api, context, &inputs_));
  }

  ~Run() {
    if (failure_) ReleaseStatus(api_, failure_);
  }

  // An optional input that is left out has no data. (So has an empty tensor.)
  Tensor input(size_t index, const char* name, bool* given = nullptr) const {
    const OrtValue* value = nullptr;
    if (index < inputs_) check(KernelContext_GetInput(api_, context_, index, &value));
    if (given) *given = value != nullptr;
    if (!value && !given) refuse(kInvalidArgument, "input %s is missing", name);
    if (!value) return {};
    Tensor tensor = tensor_of(api_, value, name);
    if (tensor.type != kFloat)
      refuse(kInvalidArgument, "input %s is %s, must be float32", name, type_name(tensor.type));
    return tensor;
  }

  float* output(const Shape& shape) const {
    OrtValue* value = nullptr;
    check(KernelContext_GetOutput(api_, context_, 0, shape.dims, shape.rank, &value));
    void* data = nullptr;
    check(GetTensorMutableData(api_, value, &data));
    return static_cast<float*>(data);
  }

  // ParallelFor of the kernels, with `pool` this object.
  static void parallel(void* pool, void (*fn)(void*, size_t), size_t total, void* data) {
    Run& run = *static_cast<Run*>(pool);
    // As many batches as parts: every thread takes the next part when it is done with one.
    OrtStatus* status = KernelContext_ParallelFor(run.api_, run.context_, fn, total, total, data);
    if (!status) return;
    if (run.failure_) ReleaseStatus(run.api_, run.failure_);
    run.failure_ = status;
  }

  void finish() {
    OrtStatus* status = failure_;
    failure_ = nullptr;
    check(status);
  }

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
  OrtStatus* failure_ = nullptr;
};

// --- sparse layers ---------------------------------------------------------------------------------------------------

// The weights of one layer: five inputs from `first` on (values, indices, rows, counts, bias) and three attributes. What
// their names begin with, `prefix`, tells the layers of a node apart, in messages too.
class Weights : public SparseWeights {
 public:
  enum Input : size_t { kValues, kIndices, kRows, kCounts, kBias, kInputs };

  static int input_type(size_t index) {
    switch (index) {
      case kValues: return kAny;  // float32 or float16: looked at in the constructor
      case kIndices: case kRows: return kUint8;
      case kCounts: return kUint16;
      default: return kFloat;
    }
  }

  Weights(const Node& node, size_t first, const std::string& prefix, int64_t inputs, int64_t outputs, int activation)
      : SparseWeights{} {
    this->activation = activation;
    K = inputs;
    N = outputs;
    const std::string names[] = {prefix + "block_columns", prefix + "panel_rows", prefix + "group_rows"};
    block = static_cast<int>(node.integer(names[0].c_str(), 1, 256));
    panel = static_cast<int>(node.integer(names[1].c_str(), 1, 256));
    group = static_cast<int>(node.integer(names[2].c_str(), 1, 4));
    if (group != 1 && group != 4)
      refuse(kInvalidGraph, "attribute %s is %d, must be 1 or 4", names[2].c_str(), group);
    if (panel % group || N % group)
      refuse(kInvalidGraph, "%s %d and the %lld features must be multiples of %s %d", names[1].c_str(), panel,
             static_cast<long long>(N), names[2].c_str(), group);

    const auto constant = [&](Input input, const char* name, int type, int other_type = kAny) {
      return node.constant(first + input, (prefix + name).c_str(), type, other_type);
    };
    const auto length = [&](const Tensor& tensor, const char* name, int64_t wanted) {
      if (tensor.shape.dims[0] != wanted)
        refuse(kInvalidGraph, "input %s%s has %lld elements, must have %lld", prefix.c_str(), name,
               static_cast<long long>(tensor.shape.dims[0]), static_cast<long long>(wanted));
    };
    const Tensor values = constant(kValues, "values", kFloat, kFloat16);
    const Tensor indices = constant(kIndices, "indices", kUint8);
    const Tensor rows = constant(kRows, "rows", kUint8);
    const Tensor counts = constant(kCounts, "counts", kUint16);
    this->values = values.data;
    half = values.type == kFloat16;
    this->indices = static_cast<const uint8_t*>(indices.data);
    this->rows = static_cast<const uint8_t*>(rows.data);
    this->counts = static_cast<const uint16_t*>(counts.data);

    const int64_t blocks = divide_up(K, block);
    const int64_t entries = times(blocks, N / group);
    length(rows, "rows", entries);
    length(counts, "counts", entries);
    length(values, "values", times(indices.shape.dims[0], group));
    if (node.has(first + kBias)) {
      const Tensor bias = constant(kBias, "bias", kFloat);
      length(bias, "bias", N);
      this->bias = bias.floats();
    }
    try {
      check_layout(blocks, indices.shape.dims[0]);
    } catch (const Refusal& refusal) {
      throw Refusal{refusal.code, prefix + refusal.text};  // begins with the name of an input
    }
    offsets = offsets_.data();
  }

  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

 private:
  // Walks through the weights as the kernels do. The arrays are as long as the attributes say, so every loop ends with
  // them; `nonzeros` columns must last exactly to the end.
  void check_layout(int64_t blocks, int64_t nonzeros) {
    const int64_t groups = N / group, per_panel = panel / group;
    const int64_t panels = divide_up(groups, per_panel);
    offsets_.reserve(panels * blocks + 1);
    int64_t entry = 0, next = 0;
    for (long long p = 0; p < panels; ++p) {
      const int size = static_cast<int>(std::min<int64_t>(per_panel, groups - p * per_panel));
      for (long long b = 0; b < blocks; ++b) {
        const int width = static_cast<int>(std::min<int64_t>(block, K - b * block));
        offsets_.push_back(next);
        bool seen[256] = {};
        int last_count = width, last_row = -1;
        for (int i = 0; i < size; ++i, ++entry) {
          uint16_t count;  // of a file that is mapped into memory: it may lie at an odd address
          std::memcpy(&count, reinterpret_cast<const char*>(counts) + 2 * entry, sizeof count);
          const int row = rows[entry];
          if (row >= size) refuse(kInvalidGraph, "rows: %d in panel %lld, which has %d rows", row, p, size);
          if (seen[row]) refuse(kInvalidGraph, "rows: %d twice in panel %lld, block %lld", row, p, b);
          seen[row] = true;
          if (count > width) refuse(kInvalidGraph, "counts: %d in block %lld, which has %d columns", count, b, width);
          if (count > last_count || (count == last_count && row < last_row))
            refuse(kInvalidGraph, "rows of panel %lld, block %lld are not sorted by count, then row", p, b);
          last_count = count;
          last_row = row;
          if (count > nonzeros - next) refuse(kInvalidGraph, "counts: their sum is more than the %lld indices",
                                              static_cast<long long>(nonzeros));
          int last_index = -1;
          for (const int64_t end = next + count; next < end; ++next) {
            const int index = indices[next];
            if (index >= width) refuse(kInvalidGraph, "indices: %d in block %lld, which has %d columns", index, b, width);
            if (index <= last_index) refuse(kInvalidGraph, "indices of panel %lld, block %lld do not ascend", p, b);
            last_index = index;
          }
        }
      }
    }
    offsets_.push_back(next);
    if (next != nonzeros)
      refuse(kInvalidGraph, "counts: their sum is %lld, there are %lld indices", static_cast<long long>(next),
             static_cast<long long>(nonzeros));
  }

  std::vector<int64_t> offsets_;
};

int activation_of(const Node& node) {
  static constexpr const char* names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "relu"};  // as in Activation
  const std::string name = node.text("activation");
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return i;
  refuse(kInvalidGraph, "attribute activation is '%s', must be none, gelu, gelu_tanh, quick_gelu or relu",
         name.c_str());
}

int64_t features(const Node& node, const char* name) {
  return node.integer(name, 1, std::numeric_limits<int64_t>::max());
}

// The LayerNorm before a layer: inputs `first` (scale) and the one after it (bias), both or none, and an attribute.
class LayerNorm {
 public:
  enum Input : size_t { kScale, kBias, kInputs };

  LayerNorm(const Node& node, size_t first, int64_t features) : given_(node.has(first + kScale)) {
    if (given_ != node.has(first + kBias))
      refuse(kInvalidGraph, "inputs norm_scale and norm_bias must be both given or both left out");
    if (!given_) return;
    const char* names[] = {"norm_scale", "norm_bias"};
    const float* vectors[kInputs];
    for (size_t i = 0; i < kInputs; ++i) {
      const Tensor tensor = node.constant(first + i, names[i], kFloat);
      if (tensor.shape.dims[0] != features)
        refuse(kInvalidGraph, "input %s has %lld elements, must have %lld", names[i],
               static_cast<long long>(tensor.shape.dims[0]), static_cast<long long>(features));
      vectors[i] = tensor.floats();
    }
    norm_ = {vectors[kScale], vectors[kBias], node.number("norm_epsilon")};
    if (norm_.epsilon < 0) refuse(kInvalidGraph, "attribute norm_epsilon is negative");
  }

  const Norm* get() const { return given_ ? &norm_ : nullptr; }

 private:
  bool given_;
  Norm norm_{};
};

// Reads x and the residual, makes y; calls compute(x, tokens, residual, y) when there are tokens.
template <class Compute>
void run_layers(Run& run, int64_t K, int64_t N, size_t residual_input, bool has_residual, const Compute& compute) {
  const Tensor x = run.input(0, "x");
  if (x.shape.rank == 0 || x.shape.last() != K)
    refuse(kInvalidArgument, "x has shape %s, its last dimension must be %lld", x.shape.text().c_str(),
           static_cast<long long>(K));
  Shape shape = x.shape;
  shape.dims[shape.rank - 1] = N;
  Tensor residual;
  if (has_residual) {
    residual = run.input(residual_input, "residual");
    if (!(residual.shape == shape))
      refuse(kInvalidArgument, "residual has shape %s, must have %s", residual.shape.text().c_str(),
             shape.text().c_str());
  }
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.rank; ++i)
    if (shape.dims[i] == 0) tokens = 0;
  for (size_t i = 0; tokens && i + 1 < shape.rank; ++i) tokens = times(tokens, shape.dims[i]);
  times(tokens, N);
  float* y = run.output(shape);
  if (tokens) compute(x.floats(), tokens, has_residual ? residual.floats() : nullptr, y);
}

class SparseLinear {
 public:
  static constexpr const char* kName = "SparseLinear";
  enum Input : size_t {
    kX,
    kWeights,
    kResidual = kWeights + Weights::kInputs,
    kNorm,
    kInputs = kNorm + LayerNorm::kInputs
  };

  static int input_type(size_t index) {
    return index == kX || index >= kResidual ? static_cast<int>(kFloat) : Weights::input_type(index - kWeights);
  }
  static int characteristic(size_t index) {
    return index == kWeights + Weights::kBias || index >= kResidual ? kOptional : kRequired;
  }

  explicit SparseLinear(const Node& node)
      : weights_(node, kWeights, "", features(node, "in_features"), features(node, "out_features"),
                 activation_of(node)),
        norm_(node, kNorm, weights_.K),
        residual_(node.has(kResidual)) {}

  void compute(Run& run) const {
    run_layers(run, weights_.K, weights_.N, kResidual, residual_,
               [&](const float* x, int64_t tokens, const float* residual, float* y) {
                 sparse_linear(weights_, norm_.get(), x, tokens, residual, y, Run::parallel, &run);
               });
  }

  static void infer(const OrtApi* api, OrtShapeInferContext* context);

 private:
  Weights weights_;
  LayerNorm norm_;
  bool residual_;
};

// Two SparseLinears of which only the second reads the first.
class SparseMlp {
 public:
  static constexpr const char* kName = "SparseMlp";
  enum Input : size_t {
    kX,
    kFirst,
    kSecond = kFirst + Weights::kInputs,
    kResidual = kSecond + Weights::kInputs,
    kNorm,
    kInputs = kNorm + LayerNorm::kInputs
  };

  static int input_type(size_t index) {
    return index == kX || index >= kResidual ? static_cast<int>(kFloat)
                                             : Weights::input_type((index - kFirst) % Weights::kInputs);
  }
  static int characteristic(size_t index) {
    return index == kFirst + Weights::kBias || index == kSecond + Weights::kBias || index >= kResidual ? kOptional
                                                                                                       : kRequired;
  }

  explicit SparseMlp(const Node& node)
      : first_(node, kFirst, "", features(node, "in_features"), features(node, "hidden_features"),
               activation_of(node)),
        second_(node, kSecond, "hidden_", first_.N, features(node, "out_features"), kNone),
        norm_(node, kNorm, first_.K),
        residual_(node.has(kResidual)) {}

  void compute(Run& run) const {
    run_layers(run, first_.K, second_.N, kResidual, residual_,
               [&](const float* x, int64_t tokens, const float* residual, float* y) {
                 // No tensor is as large as what lies between: nothing else has told that its size is a number.
                 times(times(tokens + 63, first_.K + first_.N), sizeof(float));
                 sparse_mlp(first_, second_, norm_.get(), x, tokens, residual, y, Run::parallel, &run);
               });
  }

  static void infer(const OrtApi* api, OrtShapeInferContext* context) { SparseLinear::infer(api, context); }

 private:
  Weights first_, second_;
  LayerNorm norm_;
  bool residual_;
};

// A dense layer of halves.
class HalfLinear {
 public:
  static constexpr const char* kName = "HalfLinear";
  enum Input : size_t { kX, kWeight, kBias, kInputs };

  static int input_type(size_t index) { return index == kWeight ? kFloat16 : kFloat; }
  static int characteristic(size_t index) { return index == kBias ? kOptional : kRequired; }

  explicit HalfLinear(const Node& node) {
    weights_.K = features(node, "in_features");
    weights_.N = features(node, "out_features");
    const Tensor weight = node.constant(kWeight, "weight", kFloat16, kAny, 2);
    if (!(weight.shape == Shape{{weights_.N, weights_.K}, 2}))
      refuse(kInvalidGraph, "input weight has shape %s, must have [%lld, %lld]", weight.shape.text().c_str(),
             static_cast<long long>(weights_.N), static_cast<long long>(weights_.K));
    weights_.values = static_cast<const uint16_t*>(weight.data);
    if (!node.has(kBias)) return;
    const Tensor bias = node.constant(kBias, "bias", kFloat);
    if (bias.shape.dims[0] != weights_.N)
      refuse(kInvalidGraph, "input bias has %lld elements, must have %lld", static_cast<long long>(bias.shape.dims[0]),
             static_cast<long long>(weights_.N));
    weights_.bias = bias.floats();
  }

  void compute(Run& run) const {
    run_layers(run, weights_.K, weights_.N, kInputs, false, [&](const float* x, int64_t tokens, const float*, float* y) {
      half_linear(weights_, x, tokens, y, Run::parallel, &run);
    });
  }

  static void infer(const OrtApi* api, OrtShapeInferContext* context) { SparseLinear::infer(api, context); }

 private:
  HalfWeights weights_{};
};

// --- Attention -------------------------------------------------------------------------------------------------------

class Attention {
 public:
  static constexpr const char* kName = "Attention";
  enum Input : size_t { kQ, kK, kV, kBias, kInputs };

  static int input_type(size_t) { return kFloat; }
  static int characteristic(size_t index) { return index == kQ ? kRequired : kOptional; }

  explicit Attention(const Node& node) {
    heads_ = node.integer("num_heads", 1, std::numeric_limits<int32_t>::max());
    scale_ = node.number("scale");
    heads_first_ = node.flag("kv_heads_first");
    packed_ = !node.has(kK);
    if (packed_ != !node.has(kV)) refuse(kInvalidGraph, "inputs k and v must be both given or both left out");
    if (packed_ && heads_first_) refuse(kInvalidGraph, "kv_heads_first needs the inputs k and v");
    bias_ = node.has(kBias);
  }

  void compute(Run& run) const {
    const Tensor q = run.input(kQ, "q");
    const int64_t parts = packed_ ? 3 : 1;
    if (q.shape.rank != 3 || q.shape.last() % (parts * heads_) || q.shape.last() == 0)
      refuse(kInvalidArgument, "q has shape %s, must have [batch, tokens, %s%lld heads of equal size]",
             q.shape.text().c_str(), packed_ ? "q, k and v of " : "", static_cast<long long>(heads_));
    AttentionShape s{};
    s.batch = q.shape.dims[0], s.heads = heads_, s.tq = s.tk = q.shape.dims[1], s.scale = scale_;
    const int64_t width = q.shape.last() / parts;
    s.d = width / heads_;
    s.q_token = s.k_token = s.v_token = q.shape.last();
    s.q_batch = s.k_batch = s.v_batch = s.tq * s.q_token;
    s.k_head = s.v_head = s.d;
    const float *k = nullptr, *v = nullptr;
    if (packed_) {
      if (q.data) k = q.floats() + width, v = q.floats() + 2 * width;
    } else {
      const Tensor keys = run.input(kK, "k"), values = run.input(kV, "v");
      keys_and_values(keys, values, width, s);
      k = keys.floats(), v = values.floats();
    }
    const float* bias = nullptr;
    if (bias_) {
      const Tensor given = run.input(kBias, "bias");
      bias_strides(given.shape, s);
      bias = given.floats();
    }
    Shape shape = q.shape;
    shape.dims[2] = width;
    float* out = run.output(shape);
    if (s.batch == 0 || s.tq == 0) return;
    if (s.tk == 0)  // a sum over nothing
      std::memset(out, 0, s.batch * s.tq * width * sizeof(float));
    else
      attention(s, q.floats(), k, v, bias, out, Run::parallel, &run);
  }

  static void infer(const OrtApi* api, OrtShapeInferContext* context);

 private:
  void keys_and_values(const Tensor& keys, const Tensor& values, int64_t width, AttentionShape& s) const {
    const Shape& k = keys.shape;
    const bool fits = heads_first_ ? k.rank == 4 && k.dims[0] == s.batch && k.dims[1] == heads_ && k.dims[3] == s.d
                                   : k.rank == 3 && k.dims[0] == s.batch && k.dims[2] == width;
    if (!fits) {
      const Shape wanted = heads_first_ ? Shape{{s.batch, heads_, -1, s.d}, 4} : Shape{{s.batch, -1, width}, 3};
      refuse(kInvalidArgument, "k has shape %s, must have %s", k.text().c_str(), wanted.text().c_str());
    }
    if (!(values.shape == k))
      refuse(kInvalidArgument, "v has shape %s, must have that of k, %s", values.shape.text().c_str(),
             k.text().c_str());
    s.tk = k.dims[heads_first_ ? 2 : 1];
    s.k_token = s.v_token = heads_first_ ? s.d : width;
    s.k_head = s.v_head = heads_first_ ? s.tk * s.d : s.d;
    s.k_batch = s.v_batch = s.tk * width;
  }

  static void bias_strides(const Shape& bias, AttentionShape& s) {
    const Shape full{{s.batch, s.heads, s.tq, s.tk}, 4};
    bool fits = bias.rank == 4;
    for (size_t i = 0; fits && i < 4; ++i) fits = bias.dims[i] == 1 || bias.dims[i] == full.dims[i];
    if (!fits)
      refuse(kInvalidArgument, "bias has shape %s, must have %s or 1 in place of any of them", bias.text().c_str(),
             full.text().c_str());
    s.bias_k = bias.dims[3] == 1 ? 0 : 1;
    s.bias_q = bias.dims[2] == 1 ? 0 : bias.dims[3];
    s.bias_head = bias.dims[1] == 1 ? 0 : bias.dims[2] * bias.dims[3];
    s.bias_batch = bias.dims[0] == 1 ? 0 : bias.dims[1] * bias.dims[2] * bias.dims[3];
  }

  int64_t heads_;
  float scale_;
  bool heads_first_, packed_, bias_;
};

// --- shapes of a graph before it runs --------------------------------------------------------------------------------

bool read_attribute(const OrtApi* api, const OrtShapeInferContext* context, const char* name, int64_t* value) {
  const OrtOpAttr* attribute = nullptr;
  size_t needed = 0;
  return succeeds(api, ShapeInferContext_GetAttribute(api, context, name, &attribute)) &&
         succeeds(api, ReadOpAttr(api, attribute, kAttributeInt, value, sizeof *value, &needed));
}

// Gives output 0 the shape of input 0, with what `last` (if any) makes of its last dimension; -1 is an unknown one.
// Says nothing when a dimension is not known: an output without a shape is allowed, a wrong shape is not.
void infer_like_first(const OrtApi* api, OrtShapeInferContext* context, int64_t (*last)(int64_t width, int64_t features),
                      int64_t features = 0) {
  OrtTensorTypeAndShapeInfo* input = nullptr;  // the context's own
  check(ShapeInferContext_GetInputTypeShape(api, context, 0, &input));
  Shape shape = shape_of(api, input, "input 0");
  if (shape.rank == 0) return;  // also how ONNX Runtime shows an unknown rank
  const char* names[kMostDimensions] = {};
  check(GetSymbolicDimensions(api, input, names, shape.rank));
  if (last) {
    shape.dims[shape.rank - 1] = last(shape.last(), features);
    names[shape.rank - 1] = "";
  }
  for (size_t i = 0; i < shape.rank; ++i) {
    if (!names[i]) names[i] = "";
    // ONNX Runtime would write a nameless unknown as the number -1.
    if (shape.dims[i] < 0 && !*names[i]) return;
  }
  Info output(api);
  check(CreateTensorTypeAndShapeInfo(api, &output.info));
  check(SetDimensions(api, output.info, shape.dims, shape.rank));
  check(SetSymbolicDimensions(api, output.info, names, shape.rank));
  check(ShapeInferContext_SetOutputTypeShape(api, context, 0, output.info));
}

void SparseLinear::infer(const OrtApi* api, OrtShapeInferContext* context) {
  int64_t features = 0;
  if (read_attribute(api, context, "out_features", &features) && features > 0)
    infer_like_first(api, context, [](int64_t, int64_t features) { return features; }, features);
}

void Attention::infer(const OrtApi* api, OrtShapeInferContext* context) {
  size_t inputs = 0;
  check(ShapeInferContext_GetInputCount(api, context, &inputs));
  // k and v may be left out before a bias too: then there is no telling how wide a part of q is.
  OrtTensorTypeAndShapeInfo* keys = nullptr;
  int type = kAny;
  const bool given = inputs > kV && succeeds(api, ShapeInferContext_GetInputTypeShape(api, context, kK, &keys)) &&
                     succeeds(api, GetTensorElementType(api, keys, &type)) && type == kFloat;
  if (given)
    infer_like_first(api, context, nullptr);
  else
    infer_like_first(api, context, [](int64_t width, int64_t) -> int64_t { return width > 0 ? width / 3 : -1; });
}

// --- the tables ONNX Runtime reads -----------------------------------------------------------------------------------

template <class Op>
struct Kernel {
  const OrtApi* api;
  std::string who;
  Op op;
};

struct Operator : OrtCustomOp {
  const OrtApi* api;  // for the one entry that gets none
};

// Before 1.24, ONNX Runtime crashes on an input that is left out, before it calls an operator's shape inference: there
// the outputs stay without a shape.
bool infers_shapes(const OrtApiBase* base) {
  int major = 0, minor = 0;
  const char* version = base->GetVersionString();
  return version && std::sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 24);
}

template <class Op>
Operator operator_of(const OrtApi* api, bool infers_shapes) {
  Operator op{};
  op.api = api;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return Op::input_type(index); };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Op::kInputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) { return Op::characteristic(index); };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, "vlprune", [&] {
      const std::string name = who(api, info, Op::kName);
      check(guarded(api, name.c_str(), [&] { *kernel = new Kernel<Op>{api, name, Op(Node(api, info))}; }));
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& self = *static_cast<const Kernel<Op>*>(kernel);
    return guarded(self.api, self.who.c_str(), [&] {
      Run run(self.api, context);
      self.op.compute(run);
      run.finish();
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  if (infers_shapes)
    op.InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      const OrtApi* api = static_cast<const Operator*>(op)->api;
      return guarded(api, Op::kName, [&] { Op::infer(api, context); });
    };
  return op;
}

// The operators and their domain, which sessions keep pointers to: made once and never released. One per table of
// functions, because a process can hold two ONNX Runtimes.
struct Operators {
  Operator sparse_linear, sparse_mlp, half_linear, attention;
  OrtCustomOpDomain* domain = nullptr;

  Operators(const OrtApi* api, bool infers_shapes)
      : sparse_linear(operator_of<SparseLinear>(api, infers_shapes)),
        sparse_mlp(operator_of<SparseMlp>(api, infers_shapes)),
        half_linear(operator_of<HalfLinear>(api, infers_shapes)),
        attention(operator_of<Attention>(api, infers_shapes)) {
    check(CreateCustomOpDomain(api, "vlprune", &domain));
    for (const Operator* op : {&sparse_linear, &sparse_mlp, &half_linear, &attention})
      if (OrtStatus* status = CustomOpDomain_Add(api, domain, op)) {
        ReleaseCustomOpDomain(api, domain);
        check(status);
      }
  }
};

OrtCustomOpDomain* domain_of(const OrtApi* api, const OrtApiBase* base) {
  static std::mutex& mutex = *new std::mutex;
  static auto& made = *new std::map<const OrtApi*, std::unique_ptr<const Operators>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<const Operators>& operators = made[api];
  if (!operators) operators = std::make_unique<const Operators>(api, infers_shapes(base));
  return operators->domain;
}

}  // namespace
}  // namespace vlprune

// What ONNX Runtime calls when a session's options name this library.
VLPRUNE_EXPORT vlprune::ort::OrtStatus* RegisterCustomOps(vlprune::ort::OrtSessionOptions* options,
                                                          const vlprune::ort::OrtApiBase* base) {
  using namespace vlprune;
  const ort::OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    const char* text = "vlprune's operators need ONNX Runtime 1.17 or newer (API version 17)";
    const ort::OrtApi* oldest = base->GetApi(1);  // enough to say so
    if (oldest) return ort::CreateStatus(oldest, ort::kNotImplemented, text);
    std::fprintf(stderr, "%s\n", text);  // nothing is registered, so the session will miss the operators
    return nullptr;
  }
  return guarded(api, "vlprune", [&] {
    if (const char* reason = choose_isa()) refuse(ort::kInvalidArgument, "%s", reason);
    check(ort::AddCustomOpDomain(api, options, domain_of(api, base)));
  });
}

VLPRUNE_EXPORT const char* vlprune_ops_isa() { return vlprune::isa(); }

VLPRUNE_EXPORT const char* vlprune_ops_version() { return VLPRUNE_VERSION; }
