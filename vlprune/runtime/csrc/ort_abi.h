// The part of ONNX Runtime's C interface that the operators use, declared by hand: ONNX Runtime's packages bring no headers.
//
// An OrtApi is a table of function pointers that only ever grows at its end, so a function is known by its place in the
// table (its slot) and its signature. Every slot below is in the tables of API version 17 (ONNX Runtime 1.17) and later.
// A function that can fail returns null for success, or an OrtStatus that the caller hands on or releases.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlprune::ort {

constexpr uint32_t kApiVersion = 17;  // the lowest that has every slot used here; also the version of OrtCustomOp below

// ONNX Runtime's own objects: only ever held by pointer.
struct OrtApi;
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null when this ONNX Runtime does not serve the version
  const char* (*GetVersionString)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9, kInvalidGraph = 10 };
enum ElementType : int { kAny = 0, kFloat = 1, kUint8 = 2, kUint16 = 4, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kAttributeInt = 1 };

// What an operator tells about itself. `version` stands in a slot of its own, padded to the size of a pointer.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);  // null: the CPU provider
  int (*GetInputType)(const OrtCustomOp*, size_t);              // ElementType
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);  // Characteristic
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);  // 0 is the default memory; the entry must not be null
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);  // versions of the domain that have the operator
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "ONNX Runtime reads 26 slots");

// A function of the table, called as Name(api, arguments...).
template <size_t slot, typename Signature>
struct Function;

template <size_t slot, typename Result, typename... Arguments>
struct Function<slot, Result(Arguments...)> {
  Result operator()(const OrtApi* api, Arguments... arguments) const {
    using Pointer = Result (*)(Arguments...);
    return reinterpret_cast<const Pointer*>(api)[slot](arguments...);
  }
};

constexpr Function<0, OrtStatus*(int code, const char* message)> CreateStatus;
constexpr Function<2, const char*(const OrtStatus*)> GetErrorMessage;
constexpr Function<93, void(OrtStatus*)> ReleaseStatus;

// Registration. The session options keep pointers: neither a domain nor an operator is copied.
constexpr Function<26, OrtStatus*(const char* name, OrtCustomOpDomain** out)> CreateCustomOpDomain;
constexpr Function<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add;
constexpr Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
constexpr Function<101, void(OrtCustomOpDomain*)> ReleaseCustomOpDomain;

// Tensors. A type-and-shape belongs to the caller where the call has `owned` for its out.
constexpr Function<51, OrtStatus*(OrtValue*, void** out)> GetTensorMutableData;
constexpr Function<57, OrtStatus*(OrtTensorTypeAndShapeInfo** owned)> CreateTensorTypeAndShapeInfo;
constexpr Function<59, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t count)> SetDimensions;
constexpr Function<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int* out)> GetTensorElementType;
constexpr Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)> GetDimensionsCount;
constexpr Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count)> GetDimensions;
constexpr Function<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t count)> GetSymbolicDimensions;
constexpr Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** owned)> GetTensorTypeAndShape;
constexpr Function<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo;
constexpr Function<271, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, size_t count)> SetSymbolicDimensions;

// A node, while its kernel is made. Texts: size in is the room, size out what is needed, both with the closing zero.
constexpr Function<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)> KernelInfoGetAttribute_float;
constexpr Function<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)> KernelInfoGetAttribute_int64;
constexpr Function<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size)> KernelInfoGetAttribute_string;
constexpr Function<230, OrtStatus*(const OrtKernelInfo*, size_t* out)> KernelInfo_GetInputCount;
constexpr Function<232, OrtStatus*(const OrtKernelInfo*, size_t index, char* out, size_t* size)> KernelInfo_GetInputName;
constexpr Function<244, OrtStatus*(const OrtKernelInfo*, char* out, size_t* size)> KernelInfo_GetNodeName;
// Null with success when the input is not constant. The data stays where it is as long as the kernel lives.
constexpr Function<249, OrtStatus*(const OrtKernelInfo*, size_t index, int* constant, const OrtValue** out)>
    KernelInfoGetConstantInput_tensor;

// A node, while it runs.
constexpr Function<88, OrtStatus*(const OrtKernelContext*, size_t* out)> KernelContext_GetInputCount;
constexpr Function<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)> KernelContext_GetInput;
constexpr Function<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue** out)>
    KernelContext_GetOutput;
constexpr Function<274, OrtStatus*(const OrtKernelContext*, void (*run)(void*, size_t), size_t total, size_t batches, void* data)>
    KernelContext_ParallelFor;

// Shapes of a graph before it runs. The context owns what it hands out.
constexpr Function<267, OrtStatus*(const OrtShapeInferContext*, size_t* out)> ShapeInferContext_GetInputCount;
constexpr Function<268, OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out)>
    ShapeInferContext_GetInputTypeShape;
constexpr Function<269, OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out)>
    ShapeInferContext_GetAttribute;
constexpr Function<270, OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*)>
    ShapeInferContext_SetOutputTypeShape;
constexpr Function<272, OrtStatus*(const OrtOpAttr*, int type, void* data, size_t size, size_t* needed)> ReadOpAttr;

}  // namespace vlprune::ort
