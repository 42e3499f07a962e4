// The computation of each kernel, by name. The launch of an unknown kernel is an error.
//
// Names and arguments are those of PyTorch 2.14.1 and of the CUB and Thrust in it. They are
// undocumented: they follow the headers in torch/include/ATen/native/cuda, or were found by trying.
#include <cxxabi.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <regex>
#include <tuple>

#include "engine.h"

namespace standin {

constexpr double kCyclesPerSecond = 1e9;

static std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  free(text);
  return result;
}

// Types of elements: how to read one as a double, and write one. (Integers beyond 2**53 are
// rounded.)
struct Type {
  size_t size;
  double (*get)(const char*);
  void (*put)(char*, double);
};

template <class T>
static Type plain() {
  return {sizeof(T),
          [](const char* p) {
            T v;
            memcpy(&v, p, sizeof v);
            return double(v);
          },
          [](char* p, double d) {
            T v = T(d);
            memcpy(p, &v, sizeof v);
          }};
}

static Type bfloat16() {
  return {2,
          [](const char* p) {
            uint16_t bits;
            memcpy(&bits, p, 2);
            uint32_t wide = uint32_t(bits) << 16;
            float f;
            memcpy(&f, &wide, 4);
            return double(f);
          },
          [](char* p, double d) {
            float f = float(d);
            uint32_t wide;
            memcpy(&wide, &f, 4);
            uint16_t bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
            memcpy(p, &bits, 2);
          }};
}

static const Type* type_named(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"float", plain<float>()},
      {"double", plain<double>()},
      {"long", plain<int64_t>()},
      {"int", plain<int32_t>()},
      {"short", plain<int16_t>()},
      {"signed char", plain<int8_t>()},
      {"unsigned char", plain<uint8_t>()},
      {"bool", plain<bool>()},
      {"c10::Half", plain<_Float16>()},
      {"c10::BFloat16", bfloat16()},
  };
  auto found = types.find(name);
  return found == types.end() ? nullptr : &found->second;
}

// The type in which torch computes.
static const Type* computed_in(const std::string& name) {
  if (name == "c10::Half" || name == "c10::BFloat16") return type_named("float");
  return type_named(name);
}

using Unary = std::function<double(double)>;
using Binary = std::function<double(double, double)>;

// A function of elements, with the types of its result and its arguments.
struct Elementwise {
  const Type* result = nullptr;
  std::vector<const Type*> arguments;
  std::function<double(const double*)> function;
};

static bool binary_of(const std::string& name, const char* functor, Binary& function,
                      size_t& size) {
  size = 1;
  int op = 0;
  memcpy(&op, functor, sizeof op);
  auto has = [&](const char* text) { return name.find(text) != std::string::npos; };
  if (has("MulFunctor")) function = [](double a, double b) { return a * b; };
  else if (has("DivFunctor")) function = [](double a, double b) { return a / b; };
  else if (has("div_trunc_kernel_cuda")) function = [](double a, double b) { return std::trunc(a / b); };
  else if (has("remainder_kernel_cuda")) function = [](double a, double b) { return a - b * std::floor(a / b); };
  else if (has("BitwiseAndFunctor")) function = [](double a, double b) { return double(int64_t(a) & int64_t(b)); };
  else if (has("BitwiseOrFunctor")) function = [](double a, double b) { return double(int64_t(a) | int64_t(b)); };
  else if (has("CompareEqFunctor")) {
    size = 4;
    function = [op](double a, double b) { return op == 0 ? a == b : a != b; };
  } else if (has("CompareFunctor")) {
    size = 4;
    function = [op](double a, double b) {
      return op == 0 ? a >= b : op == 1 ? a > b : op == 2 ? a <= b : a < b;
    };
  } else return false;
  return true;
}

// Recognises the functor of an elementwise kernel, whose state is at `functor`.
static bool elementwise(const std::string& name, const char* functor, Elementwise& e) {
  std::smatch m;
  static const std::regex fill("^at::native::FillFunctor<(.+)>$");
  static const std::regex add("^at::native::CUDAFunctor(OnSelf|OnOther)?_add<(.+)>$");
  static const std::regex binary(
      "^at::native::(Binary|AUnary|BUnary)Functor<([^<>,]+), ([^<>,]+), ([^<>,]+), (.+)>$");
  static const std::regex lambda(
      "^at::native::(\\w+)\\(.*\\)(::\\{lambda\\(\\)#\\d+\\}::operator\\(\\)\\(\\) const)*"
      "::\\{lambda\\(([^()]*)\\)#\\d+\\}$");
  if (std::regex_match(name, m, fill)) {
    const Type* t = type_named(m[1]);
    if (!t) return false;
    double value = t->get(functor);
    e = {t, {}, [value](const double*) { return value; }};
    return true;
  }
  if (std::regex_match(name, m, add)) {
    const Type *t = type_named(m[2]), *o = computed_in(m[2]);
    if (!t) return false;
    if (m[1].matched) {
      double b = o->get(functor), alpha = o->get(functor + o->size);
      bool self = m[1] == "OnSelf";
      e = {t, {t}, [=](const double* x) { return self ? x[0] + alpha * b : b + alpha * x[0]; }};
    } else {
      double alpha = o->get(functor);
      e = {t, {t, t}, [=](const double* x) { return x[0] + alpha * x[1]; }};
    }
    return true;
  }
  if (std::regex_match(name, m, binary)) {
    const Type *a = type_named(m[2]), *b = type_named(m[3]), *r = type_named(m[4]);
    Binary f;
    size_t size;
    if (!a || !b || !r || !binary_of(m[5], functor, f, size)) return false;
    if (m[1] == "Binary") {
      e = {r, {a, b}, [=](const double* x) { return f(x[0], x[1]); }};
      return true;
    }
    // The functor, and then the scalar.
    bool first = m[1] == "AUnary";
    const Type* o = computed_in(first ? m[2] : m[3]);
    double c = o->get(functor + (size + o->size - 1) / o->size * o->size);
    e = {r, {first ? b : a}, [=](const double* x) { return first ? f(c, x[0]) : f(x[0], c); }};
    return true;
  }
  static const std::regex flatten("^at::native::.*_flatten_indices_impl<.*, long, 8l>\\(.*");
  if (std::regex_match(name, flatten)) {
    // The place of an element of a sparse tensor, from its indexes.
    struct { const int64_t* indexes; int64_t step, dims, strides[8], dim_step; } c;
    memcpy(&c, functor, sizeof c);
    const Type* t = type_named("long");
    e = {t, {t}, [=](const double* x) {
           int64_t place = 0;
           for (int64_t d = 0; d < c.dims; d++)
             place += c.indexes[int64_t(x[0]) * c.step + d * c.dim_step] * c.strides[d];
           return double(place);
         }};
    return true;
  }
  if (std::regex_match(name, m, lambda)) {
    const Type* t = type_named(m[3]);
    std::string kernel = m[1];
    Unary f;
    static const std::map<std::string, Unary> functions = {
        {"direct_copy_kernel_cuda", [](double x) { return x; }},
        {"ceil_kernel_cuda", [](double x) { return std::ceil(x); }},
        {"exp_kernel_cuda", [](double x) { return std::exp(x); }},
        {"floor_kernel_cuda", [](double x) { return std::floor(x); }},
        {"log_kernel_cuda", [](double x) { return std::log(x); }},
        {"neg_kernel_cuda", [](double x) { return -x; }},
        {"rsqrt_kernel_cuda", [](double x) { return 1 / std::sqrt(x); }},
        {"sigmoid_kernel_cuda", [](double x) { return 1 / (1 + std::exp(-x)); }},
        {"sin_kernel_cuda", [](double x) { return std::sin(x); }},
        {"sqrt_kernel_cuda", [](double x) { return std::sqrt(x); }},
        {"tanh_kernel_cuda", [](double x) { return std::tanh(x); }},
    };
    if (auto found = functions.find(kernel); found != functions.end()) f = found->second;
    else if (kernel == "float16_copy_kernel_cuda") {
      e = {type_named("c10::Half"), {t}, [](const double* x) { return x[0]; }};
      return t != nullptr;
    } else if (kernel == "bfloat16_copy_kernel_cuda") {
      e = {type_named("c10::BFloat16"), {t}, [](const double* x) { return x[0]; }};
      return t != nullptr;
    } else return false;
    if (!t) return false;
    e = {t, {t}, [f](const double* x) { return f(x[0]); }};
    return true;
  }
  static const std::regex compared("^at::native::compare_scalar_kernel<(.+)>\\(.*::\\{lambda\\(.*\\)#1\\}$");
  if (std::regex_match(name, m, compared)) {
    const Type* t = type_named(m[1]);
    if (!t) return false;
    int op;
    memcpy(&op, functor, sizeof op);
    double c = t->get(functor + std::max(t->size, sizeof op));  // after the operator, aligned
    e = {type_named("bool"), {t}, [=](const double* x) {
           return double(op == 0 ? x[0] >= c : op == 1 ? x[0] > c : op == 2 ? x[0] <= c : x[0] < c);
         }};
    return true;
  }
  static const std::regex plain_unary("^at::native::AbsFunctor<(.+)>$");
  if (std::regex_match(name, m, plain_unary)) {
    const Type* t = type_named(m[1]);
    if (!t) return false;
    e = {t, {t}, [](const double* x) { return std::fabs(x[0]); }};
    return true;
  }
  return false;
}

// Splits the arguments of a template, but not those of nested templates.
static std::vector<std::string> template_arguments(const std::string& text, size_t at) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (; at < text.size(); at++) {
    char c = text[at];
    if (c == '<' || c == '(' || c == '{') depth++;
    if (c == '>' || c == ')' || c == '}') depth--;
    if (depth < 0) break;
    if (c == ',' && depth == 0) {
      parts.emplace_back();
      at++;
    } else parts.back() += c;
  }
  for (auto& p : parts) while (!p.empty() && p.back() == ' ') p.pop_back();
  return parts;
}

// c10::ScalarType's numbers.
static const Type* type_numbered(int number) {
  static const char* names[] = {"unsigned char", "signed char", "short", "int", "long",
                                "c10::Half", "float", "double", "", "", "", "bool",
                                "", "", "", "c10::BFloat16"};
  return number >= 0 && number < 16 ? type_named(names[number]) : nullptr;
}

// PyTorch's OffsetCalculator of N tensors, for 32-bit indexes.
template <int N>
struct Offsets {
  static constexpr int kMaxDims = 25;
  int dims;
  struct { uint32_t divisor, m1, shift; } sizes[kMaxDims];
  uint32_t strides[kMaxDims][N];

  void get(uint32_t index, uint32_t* offsets) const {
    for (int n = 0; n < N; n++) offsets[n] = 0;
    for (int dim = 0; dim < dims; dim++) {
      uint32_t at = index % sizes[dim].divisor;
      index /= sizes[dim].divisor;
      for (int n = 0; n < N; n++) offsets[n] += at * strides[dim][n];
    }
  }
};

using Make = decltype(Kernel::make);
using Place = std::function<void(int64_t, uint32_t*)>;  // where the elements of an index are

static Op computed(int64_t count, Elementwise e, std::vector<char*> data, Place place) {
  Op op;
  op.work = [=] {
    std::vector<double> x(e.arguments.size());
    std::vector<uint32_t> offsets(data.size());
    for (int64_t n = 0; n < count; n++) {
      if (place) place(n, offsets.data());
      for (size_t k = 0; k < x.size(); k++) {
        size_t offset = place ? offsets[k + 1] : n * e.arguments[k]->size;
        x[k] = e.arguments[k]->get(data[k + 1] + offset);
      }
      e.result->put(data[0] + (place ? offsets[0] : n * e.result->size), e.function(x.data()));
    }
    return cudaSuccess;
  };
  return op;
}

template <int N>
static std::optional<Op> computed_strided(int64_t count, const char* closure, const std::string& functor) {
  // The closure has the offsets, the data, and the functor.
  struct { Offsets<N> offsets; char* data[N]; } c;
  memcpy(&c, closure, sizeof c);
  Elementwise e;
  if (!elementwise(functor, closure + sizeof c, e) || e.arguments.size() + 1 != N) return {};
  return computed(count, e, std::vector<char*>(c.data, c.data + N),
                  [o = c.offsets](int64_t n, uint32_t* offsets) { o.get(uint32_t(n), offsets); });
}

static bool make_elementwise(const std::string& text, Make& make) {
  auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  std::string functor;
  int tensors = 0;
  if (has("gpu_kernel_impl_nocast<") && !has("vectorized_elementwise")) {
    functor = template_arguments(text, text.find("gpu_kernel_impl_nocast<") + 23)[0];
  } else {
    bool vectorized = has("vectorized_elementwise_kernel<");
    if (!vectorized && !has("unrolled_elementwise_kernel<")) return false;
    auto parts = template_arguments(text, text.find("elementwise_kernel<") + 19);
    if (parts.size() < 2) return false;
    functor = parts[vectorized ? 1 : 0];
  }
  std::vector<char> zeros(256);
  Elementwise e;
  if (!elementwise(functor, zeros.data(), e)) return false;
  tensors = int(e.arguments.size()) + 1;
  if (has("gpu_kernel_impl_nocast<") && !has("vectorized_elementwise")) {
    if (tensors > 3) return false;
    make = [functor, tensors](void** arguments, dim3, dim3) -> std::optional<Op> {
      int64_t count = *static_cast<int*>(arguments[0]);
      auto* closure = static_cast<char*>(arguments[1]);
      return tensors == 1   ? computed_strided<1>(count, closure, functor)
             : tensors == 2 ? computed_strided<2>(count, closure, functor)
                            : computed_strided<3>(count, closure, functor);
    };
    return true;
  }
  bool casts = has("LoadWithCast<");
  make = [functor, casts](void** arguments, dim3, dim3) -> std::optional<Op> {
    int64_t count = *static_cast<int*>(arguments[0]);
    Elementwise e;
    if (!elementwise(functor, static_cast<char*>(arguments[1]), e)) return {};
    std::vector<char*> data(1 + e.arguments.size());
    memcpy(data.data(), arguments[2], data.size() * sizeof(char*));
    if (casts) {
      auto *from = static_cast<int8_t*>(arguments[5]), *to = static_cast<int8_t*>(arguments[6]);
      for (size_t n = 0; n < e.arguments.size(); n++) e.arguments[n] = type_numbered(from[n]);
      e.result = type_numbered(to[0]);
      if (!e.result) return {};
      for (auto* t : e.arguments)
        if (!t) return {};
    }
    return computed(count, e, data, nullptr);
  };
  return true;
}

template <class Ident>
struct Reduction {  // PyTorch's ReduceOp
  char ops;
  Ident ident;
  struct {
    int element_size, inputs, outputs, step_input, step_output, ctas, input_mult[3],
        output_mult[2], width, height, threads;
    bool vectorize;
    int output_vec_size;
  } config;
  Offsets<1> input;
  Offsets<2> output;
  const char* source;
  char* target[2];
};

template <class Ident>
static Op reduced(const char* argument, const Type* t, Binary combine, double first) {
  Reduction<Ident> r;
  memcpy(&r, argument, sizeof r);
  Op op;
  op.work = [=] {
    for (int o = 0; o < r.config.outputs; o++) {
      uint32_t base[2], offset;
      r.output.get(uint32_t(o), base);
      double value = first;
      for (int n = 0; n < r.config.inputs; n++) {
        r.input.get(uint32_t(n), &offset);
        value = combine(value, t->get(r.source + base[1] + offset));
      }
      t->put(r.target[0] + base[0], value);
    }
    return cudaSuccess;
  };
  return op;
}

static bool make_reduction(const std::string& text, Make& make) {
  size_t at = text.find("ReduceOp<");
  if (text.find("reduce_kernel<") == std::string::npos || at == std::string::npos) return false;
  auto parts = template_arguments(text, at + 9);
  if (parts.size() < 4 || parts[2] != "unsigned int" || parts[0] != parts[3]) return false;
  const Type* t = type_named(parts[0]);
  auto has = [&](const char* part) { return parts[1].find(part) != std::string::npos; };
  Binary combine;
  double first = 0;
  if (has("and_kernel_cuda")) first = 1, combine = [](double a, double b) { return a && b; };
  else if (has("or_kernel_cuda")) combine = [](double a, double b) { return a || b; };
  else if (has("sum_functor")) combine = [](double a, double b) { return a + b; };
  else if (has("MinNan")) first = INFINITY, combine = [](double a, double b) { return a < b ? a : b; };
  else if (has("MaxNan")) first = -INFINITY, combine = [](double a, double b) { return a > b ? a : b; };
  if (!t || !combine) return false;
  make = [=](void** arguments, dim3, dim3) {
    auto* argument = static_cast<char*>(arguments[0]);
    return t->size == 1   ? reduced<char>(argument, t, combine, first)
           : t->size == 2 ? reduced<short>(argument, t, combine, first)
           : t->size == 4 ? reduced<int>(argument, t, combine, first)
                          : reduced<int64_t>(argument, t, combine, first);
  };
  return true;
}

static bool make_arange(const std::string& text, Make& make) {
  std::smatch m;
  static const std::regex pattern("arange_cuda_out\\(.*?\\{lambda\\(\\)#1\\}::operator\\(\\)\\(\\) const::\\{lambda\\(\\)#(\\d)\\}");
  if (!std::regex_search(text, m, pattern)) return false;
  static const char* names[] = {"", "unsigned char", "signed char", "int", "long", "short", "double", "float"};
  int number = std::stoi(m[1]);
  if (number < 1 || number > 7) return false;
  const Type *t = type_named(names[number]), *wide = number < 6 ? type_named("long") : t;
  make = [=](void** arguments, dim3, dim3) {
    int count = *static_cast<int*>(arguments[0]);
    auto* closure = static_cast<char*>(arguments[1]);
    char* target = *static_cast<char**>(arguments[2]);
    double start = wide->get(closure), step = wide->get(closure + wide->size);
    Op op;
    op.work = [=] {
      for (int n = 0; n < count; n++) t->put(target + n * t->size, start + n * step);
      return cudaSuccess;
    };
    return op;
  };
  return true;
}

// CatArrayBatchedCopy of up to 128 contiguous tensors of up to 4 dimensions.
static bool make_cat(const std::string& text, Make& make) {
  std::smatch m;
  static const std::regex pattern(
      "CatArrayBatchedCopy(|_contig|_alignedK_contig)<at::native::\\(anonymous namespace\\)"
      "::OpaqueType<(\\d+)u>, unsigned int, (\\d), 128, 1");
  if (!std::regex_search(text, m, pattern)) return false;
  size_t size = std::stoul(m[2]);
  int dims = std::stoi(m[3]);
  make = [size, dims](void** arguments, dim3 grid, dim3) -> std::optional<Op> {
    struct Inputs {
      char* data[128];
      uint32_t offset[128], along[128], count[128];
      bool contiguous[128];
    } inputs;
    struct { uint32_t size[4], stride[4]; } target;
    char* to = *static_cast<char**>(arguments[0]);
    memcpy(&inputs, arguments[1], sizeof inputs);
    memcpy(&target, arguments[2], sizeof target);
    int dim = *static_cast<int*>(arguments[3]);
    uint32_t stride = *static_cast<uint32_t*>(arguments[4]);
    for (unsigned n = 0; n < grid.y; n++)
      if (!inputs.contiguous[n]) return {};
    Op op;
    op.work = [=] {
      for (unsigned n = 0; n < grid.y; n++)
        for (uint32_t k = 0; k < inputs.count[n]; k++) {
          uint64_t rest = k, at = uint64_t(inputs.offset[n]) * stride;
          for (int d = dims - 1; d > 0; d--) {
            uint32_t length = d == dim ? inputs.along[n] : target.size[d];
            at += rest % length * target.stride[d];
            rest /= length;
          }
          at += rest * target.stride[0];
          memcpy(to + at * size, inputs.data[n] + k * size, size);
        }
      return cudaSuccess;
    };
    return op;
  };
  return true;
}

// `nonzero` of booleans, of up to one tile, and indexing by tensors: which print() of a tensor uses.
static bool make_selection(const std::string& text, Make& make) {
  auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  std::smatch m;
  static const std::regex index("index_elementwise_kernel<.*index_kernel_impl<at::native::OpaqueType<(\\d+)>");
  if (has("DeviceReduceSingleTileKernel<") && has("NonZeroOp<bool>")) {
    make = [](void** arguments, dim3, dim3) {
      auto* flags = *static_cast<char**>(arguments[0]);
      auto* result = *static_cast<int**>(arguments[1]);
      auto count = *static_cast<uint64_t*>(arguments[2]);
      Op op;
      op.work = [=] {
        *result = 0;
        for (uint64_t n = 0; n < count; n++) *result += flags[n] != 0;
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  if (has("DeviceSelectSweepKernel<") && has("NonZeroOp<bool>")) {
    make = [](void** arguments, dim3, dim3) {
      auto first = *static_cast<int64_t*>(arguments[0]);
      auto* flags = *static_cast<char**>(arguments[1]);
      auto* to = *static_cast<int64_t**>(arguments[2]);
      auto* result = *static_cast<int**>(arguments[3]);
      int count = *static_cast<int*>(arguments[7]);
      Op op;
      op.work = [=] {
        *result = 0;
        for (int n = 0; n < count; n++)
          if (flags[n]) to[(*result)++] = first + n;
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  if (std::regex_search(text, m, index)) {
    size_t size = std::stoul(m[1]);
    make = [size](void** arguments, dim3, dim3) -> std::optional<Op> {
      struct {
        Offsets<3> offsets;
        char *to, *from;
        int64_t indexes;
        char* index[25];
        int64_t sizes[25], strides[25];
      } c;
      auto count = *static_cast<int64_t*>(arguments[0]);
      memcpy(&c, arguments[1], sizeof c);
      Op op;
      if (!memory_of(c.to) || !memory_of(c.from) || int(c.indexes) < 1 || int(c.indexes) > 25)
        return {};  // the closure has changed
      op.work = [=] {
        for (int64_t n = 0; n < count; n++) {
          uint32_t offsets[3];
          c.offsets.get(uint32_t(n), offsets);
          int64_t at = 0;
          for (int i = 0; i < int(c.indexes); i++) {
            int64_t index = *reinterpret_cast<int64_t*>(c.index[i] + offsets[2]);
            at += (index < 0 ? index + c.sizes[i] : index) * c.strides[i];
          }
          memcpy(c.to + offsets[0], c.from + offsets[1] + at, size);
        }
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  return false;
}

// PyTorch's TensorInfo, for 32-bit indexes.
struct Info {
  char* data;
  uint32_t sizes[25], strides[25];
  int dims;

  uint64_t offset(uint32_t index) const {
    uint64_t at = 0;
    for (int d = dims - 1; d > 0; d--) {
      at += uint64_t(index % sizes[d]) * strides[d];
      index /= sizes[d];
    }
    return at + uint64_t(index) * strides[0];
  }
};

// Slices of keys, with values (the indexes), sorted in place; stable, as no order is wrong.
static bool make_sort(const std::string& text, Make& make) {
  size_t at = text.find("bitonicSortKVInPlace<");
  if (at == std::string::npos) return false;
  auto parts = template_arguments(text, at + 21);
  if (parts.size() < 8 || parts[7] != "unsigned int") return false;
  const Type *k = type_named(parts[4]), *v = type_named(parts[5]);
  bool descending = parts[6].find("::GTOp<") != std::string::npos;
  if (!k || !v) return false;
  make = [=](void** arguments, dim3, dim3) {
    Info keys, values;
    memcpy(&keys, arguments[0], sizeof keys);
    auto slices = *static_cast<uint32_t*>(arguments[1]);
    auto length = *static_cast<uint32_t*>(arguments[2]);
    auto key_stride = *static_cast<uint32_t*>(arguments[3]);
    memcpy(&values, arguments[4], sizeof values);
    auto value_stride = *static_cast<uint32_t*>(arguments[5]);
    Op op;
    op.work = [=] {
      for (uint32_t s = 0; s < slices; s++) {
        char* key = keys.data + keys.offset(s) * k->size;
        char* value = values.data + values.offset(s) * v->size;
        std::vector<std::pair<double, double>> pairs;
        for (uint64_t n = 0; n < length; n++)
          pairs.emplace_back(k->get(key + n * key_stride * k->size),
                             v->get(value + n * value_stride * v->size));
        std::stable_sort(pairs.begin(), pairs.end(), [=](auto& a, auto& b) {
          auto less = [](double x, double y) { return x < y || (std::isnan(y) && !std::isnan(x)); };
          return descending ? less(b.first, a.first) : less(a.first, b.first);
        });
        for (uint64_t n = 0; n < length; n++) {
          k->put(key + n * key_stride * k->size, pairs[n].first);
          v->put(value + n * value_stride * v->size, pairs[n].second);
        }
      }
      return cudaSuccess;
    };
    return op;
  };
  return true;
}

// The kernels of thrust and cub that coalesce a sparse tensor.
static bool make_coalescing(const std::string& text, Make& make) {
  auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  if (has("::transform_kernel<") && has("__identity") && has("device_ptr<long>, ") &&
      has("kernel_arg<thrust::") && has("counting_iterator<long")) {
    make = [](void** arguments, dim3, dim3) {
      int count = *static_cast<int*>(arguments[0]);
      auto* to = *static_cast<int64_t**>(arguments[3]);
      auto first = *static_cast<int64_t*>(arguments[4]);
      Op op;
      op.work = [=] {
        for (int n = 0; n < count; n++) to[n] = first + n;
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  if (has("DeviceMergeSortBlockSortKernel<") && has("LTOp<long, false>, long, long>(")) {
    make = [](void** arguments, dim3 grid, dim3) -> std::optional<Op> {
      if (grid.x > 1 || !*static_cast<bool*>(arguments[0])) return {};  // it is not all
      int64_t *keys, *values, *sorted_keys, *sorted_values;
      for (auto [n, p] : {std::pair{1, &keys}, {2, &values}, {3, &sorted_keys}, {4, &sorted_values}})
        memcpy(p, arguments[n], sizeof *p);
      auto count = *static_cast<uint32_t*>(arguments[5]);
      Op op;
      op.work = [=] {
        std::vector<std::pair<int64_t, int64_t>> pairs;
        for (uint32_t n = 0; n < count; n++) pairs.emplace_back(keys[n], values[n]);
        std::stable_sort(pairs.begin(), pairs.end(),
                         [](auto& a, auto& b) { return a.first < b.first; });
        for (uint32_t n = 0; n < count; n++)
          std::tie(sorted_keys[n], sorted_values[n]) = pairs[n];
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  if (has("DeviceUniqueByKeySweepKernel<") && has("device_ptr<long>, ") && has("equal_to<")) {
    make = [](void** arguments, dim3 grid, dim3) -> std::optional<Op> {
      if (grid.x > 1) return {};
      int64_t *keys, *values, *unique_keys, *first_values;
      for (auto [n, p] : {std::pair{0, &keys}, {1, &values}, {2, &unique_keys}, {3, &first_values}})
        memcpy(p, arguments[n], sizeof *p);
      auto* result = *static_cast<int**>(arguments[4]);
      int count = *static_cast<int*>(arguments[7]);
      Op op;
      op.work = [=] {
        int found = 0;
        for (int n = 0; n < count; n++) {
          int64_t key = keys[n];  // as the result may take its place
          if (found && unique_keys[found - 1] == key) continue;
          first_values[found] = values[n];
          unique_keys[found++] = key;
        }
        *result = found;
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  if (size_t at = text.find("apply::coalesceValuesKernel<"); at != std::string::npos) {
    const Type* t = type_named(template_arguments(text, at + 28)[0]);
    if (!t) return false;
    make = [t](void** arguments, dim3, dim3) {
      auto* first = *static_cast<int64_t**>(arguments[0]);
      auto* place = *static_cast<int64_t**>(arguments[1]);
      auto* from = *static_cast<char**>(arguments[2]);
      auto* to = *static_cast<char**>(arguments[3]);
      auto count = *static_cast<int64_t*>(arguments[4]), sums = *static_cast<int64_t*>(arguments[5]);
      auto length = *static_cast<int64_t*>(arguments[6]);
      Op op;
      op.work = [=] {
        for (int64_t s = 0; s < sums; s++)
          for (int64_t k = 0; k < length; k++) {
            double sum = 0;
            for (int64_t n = first[s]; n < (s + 1 < sums ? first[s + 1] : count); n++)
              sum += t->get(from + (place[n] * length + k) * t->size);
            t->put(to + (s * length + k) * t->size, sum);
          }
        return cudaSuccess;
      };
      return op;
    };
    return true;
  }
  return false;
}

// Prepares the temporary memory of a scan. The kernels here need none.
static bool make_nothing(const std::string& text, Make& make) {
  for (auto name : {"DeviceCompactInitKernel<", "DeviceScanInitKernel<"})
    if (text.find(name) != std::string::npos) {
      make = [](void**, dim3, dim3) { return Op{}; };
      return true;
    }
  return false;
}

static void look_up(Kernel& kernel) {
  kernel.looked_up = true;
  std::string text = demangled(kernel.name);
  auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  if (has("spin_kernel(")) {
    kernel.make = [](void** arguments, dim3, dim3) {
      Op op;
      op.seconds = double(*static_cast<int64_t*>(arguments[0])) / kCyclesPerSecond;
      return op;
    };
  } else if (has("_assert_async_cuda_kernel<")) {
    const Type* t = type_named(template_arguments(text, text.find('<') + 1)[0]);
    kernel.make = [t](void** arguments, dim3, dim3) {
      const char* input = *static_cast<char**>(arguments[0]);
      Op op;
      op.work = [=] {
        if (!t || t->get(input) != 0) return cudaSuccess;
        fprintf(stderr, "the stand-in for CUDA: Assertion `input[0] != 0` failed.\n");
        return cudaErrorAssert;
      };
      return op;
    };
  } else {
    make_elementwise(text, kernel.make) || make_reduction(text, kernel.make) ||
        make_arange(text, kernel.make) || make_cat(text, kernel.make) ||
        make_selection(text, kernel.make) || make_sort(text, kernel.make) ||
        make_coalescing(text, kernel.make) ||
        make_nothing(text, kernel.make);
  }
}

std::optional<Op> op_of_launch(Kernel& kernel, void** arguments, dim3 grid, dim3 block) {
  if (!kernel.looked_up) look_up(kernel);
  if (kernel.make)
    if (auto op = kernel.make(arguments, grid, block)) return op;
  state().unknown_kernels.push_back(demangled(kernel.name));
  return {};
}

}  // namespace standin
