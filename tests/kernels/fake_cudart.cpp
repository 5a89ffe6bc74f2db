// Enough of CUDA's runtime, without a GPU, for a CUTLASS library to be loaded and its launcher to run to the end: what it
// asks for is kept, to be looked at. Built under the runtime's own name and found before it.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

std::string record;
int next_error = 0, resident = 2, handle = 0, num_arguments = 0, argument_bytes[16];

void add(char const* name, long long value) { record += std::string(name) + " " + std::to_string(value) + "\n"; }

int encode(void* map, int kind, uint32_t rank, void* address, uint64_t const* sizes, uint64_t const* strides,
           uint32_t const* box, uint32_t const* steps, int interleave, int swizzle, int, int fill) {
  record += "map kind " + std::to_string(kind) + " address " + std::to_string(reinterpret_cast<uintptr_t>(address));
  record += " sizes";
  for (uint32_t i = 0; i < rank; ++i) record += " " + std::to_string(sizes[i]);
  record += " strides";
  for (uint32_t i = 0; i + 1 < rank; ++i) record += " " + std::to_string(strides[i]);
  record += " box";
  for (uint32_t i = 0; i < rank; ++i) record += " " + std::to_string(box[i] * (steps[i] == 1));
  record += " swizzle " + std::to_string(swizzle) + " interleave " + std::to_string(interleave) + " fill " +
            std::to_string(fill) + "\n";
  std::memset(map, 0, 128);
  return 0;
}

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&handle); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(...) {}
void __cudaRegisterVar(...) {}
int __cudaGetKernel(void** kernel, void const* function) {
  *kernel = const_cast<void*>(function);
  return 0;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *stream = configuration.stream;
  return 0;
}
// Of each argument as many bytes are kept as `fake_expect` said.
int __cudaLaunchKernel(void*, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  add("grid", (long long)grid.x * grid.y * grid.z);
  add("block", (long long)block.x * block.y * block.z);
  add("shared", (long long)shared);
  add("stream", (long long)reinterpret_cast<uintptr_t>(stream));
  for (int i = 0; i < num_arguments; ++i) {
    record += "argument ";
    char text[3];
    for (int byte = 0; byte < argument_bytes[i]; ++byte) {
      std::snprintf(text, sizeof(text), "%02x", static_cast<unsigned char*>(arguments[i])[byte]);
      record += text;
    }
    record += "\n";
  }
  return 0;
}
int cudaFuncSetAttribute(void const*, int attribute, int value) {
  add(attribute == 8 ? "allowed" : "attribute", value);
  return next_error;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int, size_t, unsigned) {
  *blocks = resident;
  return 0;
}
int cudaGetLastError() { return 0; }
char const* cudaGetErrorString(int error) { return error == 1 ? "invalid argument" : "another error"; }
int cudaGetDriverEntryPointByVersion(char const* name, void** function, unsigned, unsigned long long, int* found) {
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&encode) : nullptr;
  if (found) *found = 0;
  return *function ? 0 : 1;
}

char const* fake_record() { return record.c_str(); }
void fake_expect(int error, int const* bytes, int count) {
  record.clear();
  next_error = error;
  num_arguments = count;
  std::memcpy(argument_bytes, bytes, count * sizeof(int));
}
}
