// The kernels of this folder as ONNX Runtime operators of the CUDA provider, and (functions.cuh) as plain functions.
//
//   utune.GroupedBottleneckNAME(x, base, task, down, up, bias [, down_bias, up_bias] [, residual]) -> out
//   utune.NormedBranchNAME(a [, bias, skip], gamma, beta, task, down, up [, down_bias, up_bias]) -> normed, carried
//
// NAME is an activation, then Biased where the branch has biases, then Residual, or Skip, where those inputs are there.
// In an engine the same node is a function of standard operators (export/passes/outline_branches.py): a session that
// registers this library runs the kernel, any other runs the function.
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstring>

#include "functions.cuh"

namespace {

constexpr uint32_t kApi = 18;  // of ONNX Runtime: the oldest that has all that is used here
constexpr char kDomain[] = "utune";
const char* const kActivations[] = {"Identity", "Relu", "Gelu", "GeluTanh", "Tanh", "Sigmoid"};  // as utune::Activation
enum Input { kX, kBase, kTask, kDown, kUp, kBias, kFixed };

template <typename T>
constexpr ONNXTensorElementDataType kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
template <>
constexpr ONNXTensorElementDataType kType<__nv_bfloat16> = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

const OrtApi* api = nullptr;  // set when the library is registered

struct Kernel {
  int activation, processors, shared;
  bool biased, third;
  float epsilon;
};

OrtStatus* refuse(const char* what) {
  char text[256];
  std::snprintf(text, sizeof text, "utune.GroupedBottleneck: %s", what);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

#define TRY(call)                                  \
  do {                                             \
    if (OrtStatus* status = (call)) return status; \
  } while (0)

OrtStatus* dimensions(const OrtValue* value, int64_t* to, size_t wanted) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  TRY(api->GetTensorTypeAndShape(value, &info));
  size_t count = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &count);
  if (!status && count != wanted) status = refuse("an input has another number of axes");
  if (!status) status = api->GetDimensions(info, to, wanted);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// What both operators are to ONNX Runtime; `third` is the residual of the one and the skip of the other.
template <typename T>
struct Op : OrtCustomOp {
  Op(const char* base, const char* third_name, int activation, bool biased, bool third)
      : OrtCustomOp{}, activation(activation), biased(biased), third(third) {
    std::snprintf(name, sizeof name, "%s%s%s%s", base, kActivations[activation], biased ? "Biased" : "", third ? third_name : "");
    version = kApi;
    GetName = [](const OrtCustomOp* op) -> const char* { return own(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp* op) -> size_t { return own(op).inputs; };
    GetInputType = [](const OrtCustomOp* op, size_t i) {
      return i == own(op).task ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : kType<T>;
    };
    GetOutputTypeCount = [](const OrtCustomOp* op) -> size_t { return own(op).outputs; };
    GetOutputType = [](const OrtCustomOp*, size_t) { return kType<T>; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Op& own(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

  static OrtStatus* kernel_of(const OrtCustomOp* op, float epsilon, void** kernel) {
    int device = 0, processors = 0, shared = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
      return refuse("no CUDA device");
    *kernel = new Kernel{own(op).activation, processors, shared, own(op).biased, own(op).third, epsilon};
    return nullptr;
  }

  static OrtStatus* read(OrtKernelContext* context, int count, const OrtValue** values, const void** data) {
    for (int i = 0; i < count; ++i) {
      TRY(api->KernelContext_GetInput(context, i, &values[i]));
      TRY(api->GetTensorMutableData(const_cast<OrtValue*>(values[i]), const_cast<void**>(&data[i])));
    }
    return nullptr;
  }

  static OrtStatus* write(OrtKernelContext* context, int number, const int64_t* shape, T** out) {
    OrtValue* output = nullptr;
    TRY(api->KernelContext_GetOutput(context, number, shape, 3, &output));
    return api->GetTensorMutableData(output, reinterpret_cast<void**>(out));
  }

  static OrtStatus* same_shape(OrtShapeInferContext* context, size_t input, size_t outputs) {
    OrtTensorTypeAndShapeInfo* shape = nullptr;
    TRY(api->ShapeInferContext_GetInputTypeShape(context, input, &shape));
    for (size_t i = 0; i < outputs; ++i) TRY(api->ShapeInferContext_SetOutputTypeShape(context, i, shape));
    return nullptr;
  }

  char name[64];
  int activation;
  bool biased, third;
  size_t inputs, outputs, task;
};

template <typename T>
struct GroupedBottleneck : Op<T> {
  GroupedBottleneck(int activation, bool biased, bool residual) : Op<T>("GroupedBottleneck", "Residual", activation, biased, residual) {
    this->inputs = kFixed + 2 * biased + residual;
    this->outputs = 1;
    this->task = kTask;
    this->CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo*, void** kernel) { return Op<T>::kernel_of(op, 0.f, kernel); };
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) { return Op<T>::same_shape(context, kBase, 1); };
    this->KernelComputeV2 = compute;
  }

  static OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const OrtValue* values[kFixed + 3] = {};
    const void* data[kFixed + 3] = {};
    const int given = kFixed + 2 * kernel.biased + kernel.third;
    TRY(Op<T>::read(context, given, values, data));
    int64_t x[3], base[3], down[3], up[3], task[1];
    TRY(dimensions(values[kX], x, 3));
    TRY(dimensions(values[kBase], base, 3));
    TRY(dimensions(values[kDown], down, 3));
    TRY(dimensions(values[kUp], up, 3));
    TRY(dimensions(values[kTask], task, 1));
    const bool fits = x[0] == base[0] && x[1] == base[1] && x[0] == task[0] && down[0] == up[0] && down[1] == up[2] &&
                      down[2] == x[2] && up[1] == base[2] && x[2] % utune::kChunk == 0 && base[2] % utune::kChunk == 0;
    if (!fits) return refuse("the shapes do not fit: x [B, N, Cin], base [B, N, Cout], down [T, R, Cin], up [T, Cout, R]");
    if (kernel.third) {
      int64_t r[3];
      TRY(dimensions(values[given - 1], r, 3));
      if (std::memcmp(r, base, sizeof r)) return refuse("the residual has another shape than the base");
    }
    T* out = nullptr;
    void* stream = nullptr;
    TRY(Op<T>::write(context, 0, base, &out));
    TRY(api->KernelContext_GetGPUComputeStream(context, &stream));
    if (base[0] * base[1] == 0) return nullptr;
    const utune::Shape shape{(int)x[0], (int)x[1], (int)x[2], (int)base[2], (int)down[1], (int)down[0]};
    const auto as = [&](int i) { return static_cast<const T*>(data[i]); };
    const utune::Inputs<T> in{as(kX), as(kBase), kernel.third ? as(given - 1) : nullptr, static_cast<const int64_t*>(data[kTask]),
                              as(kDown), as(kUp), as(kBias), kernel.biased ? as(kFixed) : nullptr, kernel.biased ? as(kFixed + 1) : nullptr};
    const cudaError_t status = utune::run<T>(in, out, shape, kernel.activation, kernel.processors, static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? nullptr : refuse(cudaGetErrorString(status));
  }
};

template <typename T>
struct NormedBranch : Op<T> {
  NormedBranch(int activation, bool biased, bool skip) : Op<T>("NormedBranch", "Skip", activation, biased, skip) {
    this->inputs = 6 + 2 * biased + 2 * skip;
    this->outputs = 2;
    this->task = 3 + 2 * skip;
    this->CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
      float epsilon = 0.f;
      TRY(api->KernelInfoGetAttribute_float(info, "epsilon", &epsilon));
      return Op<T>::kernel_of(op, epsilon, kernel);
    };
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) { return Op<T>::same_shape(context, 0, 2); };
    this->KernelComputeV2 = compute;
  }

  static OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(opaque);
    const OrtValue* values[10] = {};
    const void* data[10] = {};
    const int at = 1 + 2 * kernel.third, given = at + 5 + 2 * kernel.biased;  // where gamma stands
    TRY(Op<T>::read(context, given, values, data));
    int64_t a[3], down[3], up[3], task[1];
    TRY(dimensions(values[0], a, 3));
    TRY(dimensions(values[at + 2], task, 1));
    TRY(dimensions(values[at + 3], down, 3));
    TRY(dimensions(values[at + 4], up, 3));
    const bool fits = task[0] == a[0] && down[0] == up[0] && down[1] == up[2] && down[2] == a[2] && up[1] == a[2] &&
                      a[2] % utune::kChunk == 0 && a[2] <= utune::kWidest;
    if (!fits) return refuse("the shapes do not fit: a [B, N, C], down [T, R, C], up [T, C, R], C a multiple of 64");
    if (kernel.third) {
      int64_t r[3];
      TRY(dimensions(values[2], r, 3));
      if (std::memcmp(r, a, sizeof r)) return refuse("the skip has another shape than the input");
    }
    T *normed = nullptr, *carried = nullptr;
    void* stream = nullptr;
    TRY(Op<T>::write(context, 0, a, &normed));
    TRY(Op<T>::write(context, 1, a, &carried));
    TRY(api->KernelContext_GetGPUComputeStream(context, &stream));
    if (a[0] * a[1] == 0) return nullptr;
    const utune::NormedShape shape{(int)a[0], (int)a[1], (int)a[2], (int)down[1], (int)down[0], kernel.epsilon};
    const auto as = [&](int i) { return static_cast<const T*>(data[i]); };
    const utune::NormedInputs<T> in{as(0), kernel.third ? as(1) : nullptr, kernel.third ? as(2) : nullptr, as(at), as(at + 1),
                                    static_cast<const int64_t*>(data[at + 2]), as(at + 3), as(at + 4),
                                    kernel.biased ? as(at + 5) : nullptr, kernel.biased ? as(at + 6) : nullptr};
    const cudaError_t status = utune::run_normed<T>(in, normed, carried, shape, kernel.activation, kernel.processors, kernel.shared,
                                                    static_cast<cudaStream_t>(stream));
    return status == cudaSuccess ? nullptr : refuse(cudaGetErrorString(status));
  }
};

template <typename T>
OrtStatus* add(OrtCustomOpDomain* domain) {
  for (int i = 0; i < 4 * utune::kActivationCount; ++i) {  // they live as long as the library
    TRY(api->CustomOpDomain_Add(domain, new GroupedBottleneck<T>(i / 4, i % 4 / 2, i % 2)));
    TRY(api->CustomOpDomain_Add(domain, new NormedBranch<T>(i / 4, i % 4 / 2, i % 2)));
  }
  return nullptr;
}

}  // namespace

extern "C" {

// What ONNX Runtime calls when the library is registered.
OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  api = base->GetApi(kApi);
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    TRY(api->CreateCustomOpDomain(kDomain, &domain));
    TRY(add<__half>(domain));
    TRY(add<__nv_bfloat16>(domain));
  }
  return api->AddCustomOpDomain(options, domain);
}
}
