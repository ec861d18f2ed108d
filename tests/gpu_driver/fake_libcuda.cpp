// A stand-in for NVIDIA's driver, for tests on machines without a GPU.
//
// Device memory is host memory, and a stream is a queue that is worked off only when something waits for it: who
// reads too early, frees too early or reuses a host buffer too early gets wrong values here, as he would on a GPU.
// Kernels run in the project's emulator: FAKE_CUDA_KERNELS names a folder with one file per PTX text, <FNV-1a 64 of
// the text>.txt: the library that the same source was compiled to, then a line "name kind size" for each parameter
// (kind as emulator_core.h counts; size of an element). Every rule of the interface that the project relies on is
// checked, and breaking one is an error, with a line on FAKE_CUDA_LOG where that names a file.
//
// FAKE_CUDA_DEVICES (1), FAKE_CUDA_CAPABILITY (89), FAKE_CUDA_VERSION (12080), FAKE_CUDA_ISA (807),
// FAKE_CUDA_POOLS (1), FAKE_CUDA_INIT (0), FAKE_CUDA_MEMORY (1073741824) say what it plays.

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_PTX = 218, UNSUPPORTED_PTX_VERSION = 222,
  INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, LAUNCH_OUT_OF_RESOURCES = 701,
  LAUNCH_FAILED = 719, STREAM_CAPTURE_UNSUPPORTED = 900, STREAM_CAPTURE_INVALIDATED = 901, STREAM_CAPTURE_UNMATCHED = 903,
  STREAM_CAPTURE_UNJOINED = 904, SYSTEM_DRIVER_MISMATCH = 803,
};
const std::map<int, const char*> NAMES = {
    {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {218, "CUDA_ERROR_INVALID_PTX"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"}, {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}, {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
};

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

using Work = std::function<int()>;  // what a queue holds; returns a result code
struct Stream { std::vector<Work> queue; bool capturing = false, spoilt = false; std::vector<Work> captured; };
struct Event { bool recorded = false, done = false; double when = 0; };
struct Graph { std::vector<Work> work; };
struct Parameter { size_t size; };

// What the emulator's libraries export (emulator_core.h).
struct EmulatedParameter { void* data; uint64_t bytes, address; const char* name; uint32_t granule, kind; };
struct Description { uint32_t grid[3], threads, dynamic_shared, count; EmulatedParameter* parameters; };
struct Failure { char what[512]; int launch, block[3], thread; uint32_t line; char file[128]; };
using Launches = int (*)(uint32_t, Description*, uint32_t, uint32_t, uint64_t, Failure*);
using CountStates = uint32_t (*)();
using FindState = void* (*)(uint32_t, const char**, uint64_t*);
struct Known { std::string name; unsigned kind, granule; };

struct Module;
struct Function { Module* module; std::string name; std::vector<Parameter> parameters; unsigned most_threads = 1024; unsigned shared = 0; };
struct Module { void* library = nullptr; std::string ptx; std::vector<Known> known; std::vector<std::string> state; std::map<std::string, std::unique_ptr<Function>> functions; };

std::recursive_mutex guard;
bool started = false;
int retained = 0;
int sticky = SUCCESS;  // after a kernel breaks down every call fails
std::map<uint64_t, uint64_t> memory;      // device
std::map<uint64_t, uint64_t> freed_later; // freed in the order of a stream, but not yet there
std::map<uint64_t, uint64_t> pinned;
std::set<void*> streams, events, graphs, executables, modules, functions;
int context_object;
thread_local void* current = nullptr;
thread_local std::vector<void*> pushed;
uint64_t used = 0;

int fail(int code, const std::string& why) {
  if (const char* path = std::getenv("FAKE_CUDA_LOG")) {
    if (FILE* file = std::fopen(path, "a")) { std::fprintf(file, "%d %s\n", code, why.c_str()); std::fclose(file); }
  }
  return code;
}
double now() {
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}
// The bytes from an address to the end of its allocation; 0 where there is none.
uint64_t room(const std::map<uint64_t, uint64_t>& where, uint64_t address) {
  auto after = where.upper_bound(address);
  if (after == where.begin()) return 0;
  --after;
  return address < after->first + after->second ? after->first + after->second - address : 0;
}
bool any_capture() {
  for (void* stream : streams) if (static_cast<Stream*>(stream)->capturing) return true;
  return false;
}
void spoil() { for (void* stream : streams) if (static_cast<Stream*>(stream)->capturing) static_cast<Stream*>(stream)->spoilt = true; }

int run(std::vector<Work>& queue) {
  while (!queue.empty()) {
    Work work = std::move(queue.front());
    queue.erase(queue.begin());
    if (int code = work()) return sticky = code;
  }
  return SUCCESS;
}
int finish_all() {
  for (void* stream : streams) if (int code = run(static_cast<Stream*>(stream)->queue)) return code;
  return SUCCESS;
}
uint64_t hash(const std::string& text) {
  uint64_t value = 14695981039346656037ull;
  for (unsigned char c : text) value = (value ^ c) * 1099511628211ull;
  return value;
}
void* resolve(void* handle);
int enqueue(void* handle, Work work) {
  handle = resolve(handle);
  if (!handle) return fail(INVALID_HANDLE, "the default stream is not used by this project");
  if (!streams.count(handle)) return fail(INVALID_HANDLE, "no such stream");
  auto* stream = static_cast<Stream*>(handle);
  (stream->capturing ? stream->captured : stream->queue).push_back(std::move(work));
  return SUCCESS;
}
// The handles 1 and 2 are the default streams; only events are used with them here.
Stream default_streams[2];
void* resolve(void* handle) {
  auto number = reinterpret_cast<uintptr_t>(handle);
  if (number != 1 && number != 2) return handle;
  streams.insert(&default_streams[number - 1]);
  return &default_streams[number - 1];
}
// Calls that a capture forbids spoil it.
int forbidden(const char* name) {
  spoil();
  return fail(STREAM_CAPTURE_UNSUPPORTED, std::string(name) + " during a capture");
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER                                                                    \
  std::lock_guard<std::recursive_mutex> lock(guard);                             \
  if (!started) return fail(NOT_INITIALIZED, std::string(__func__) + " before cuInit"); \
  if (sticky) return sticky;
#define NEED_CONTEXT \
  ENTER if (current != &context_object || !retained) return fail(INVALID_CONTEXT, std::string(__func__) + " without a context");

API cuInit(unsigned flags) {
  if (flags) return fail(INVALID_VALUE, "cuInit flags");
  if (long code = setting("FAKE_CUDA_INIT", 0)) return static_cast<int>(code);
  started = true;
  return SUCCESS;
}
API cuGetErrorName(int code, const char** out) {
  auto found = NAMES.find(code);
  *out = found == NAMES.end() ? nullptr : found->second;
  return found == NAMES.end() ? INVALID_VALUE : SUCCESS;
}
API cuGetErrorString(int code, const char** out) {
  *out = NAMES.count(code) ? "as the stand-in says" : nullptr;
  return NAMES.count(code) ? SUCCESS : INVALID_VALUE;
}
API cuDriverGetVersion(int* out) { *out = static_cast<int>(setting("FAKE_CUDA_VERSION", 12080)); return SUCCESS; }
API cuDeviceGetCount(int* out) { ENTER *out = static_cast<int>(setting("FAKE_CUDA_DEVICES", 1)); return SUCCESS; }
API cuDeviceGet(int* out, int index) {
  ENTER
  if (index < 0 || index >= setting("FAKE_CUDA_DEVICES", 1)) return INVALID_DEVICE;
  *out = index + 40;  // a handle is no index
  return SUCCESS;
}
API cuDeviceGetName(char* out, int length, int device) {
  ENTER
  if (device < 40) return fail(INVALID_DEVICE, "an index for a device");
  std::snprintf(out, static_cast<size_t>(length), "Stand-in GPU");
  return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* out, int device) {
  ENTER
  if (device < 40) return INVALID_DEVICE;
  *out = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1 << 30));
  return SUCCESS;
}
API cuDeviceGetAttribute(int* out, int which, int device) {
  ENTER
  if (device < 40) return INVALID_DEVICE;
  long capability = setting("FAKE_CUDA_CAPABILITY", 89);
  switch (which) {
    case 75: *out = static_cast<int>(capability / 10); return SUCCESS;
    case 76: *out = static_cast<int>(capability % 10); return SUCCESS;
    case 16: *out = 2; return SUCCESS;
    case 38: *out = 1 << 22; return SUCCESS;
    case 8: *out = 49152; return SUCCESS;
    case 13: *out = 1000000; return SUCCESS;
    case 115: *out = static_cast<int>(setting("FAKE_CUDA_POOLS", 1)); return SUCCESS;
    default: return fail(INVALID_VALUE, "device attribute " + std::to_string(which));
  }
}
API cuDevicePrimaryCtxRetain(void** out, int device) {
  ENTER
  if (device < 40) return fail(INVALID_DEVICE, "an index for a device");
  ++retained;
  *out = &context_object;
  return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER
  if (device < 40 || retained == 0) return fail(INVALID_CONTEXT, "released too often");
  --retained;
  return SUCCESS;
}
API cuCtxSetCurrent(void* context) {
  ENTER
  if (context && context != &context_object) return fail(INVALID_CONTEXT, "no context of ours");
  current = context;
  return SUCCESS;
}
API cuCtxPushCurrent_v2(void* context) {
  ENTER
  if (context != &context_object) return fail(INVALID_CONTEXT, "no context of ours");
  pushed.push_back(current);
  current = context;
  return SUCCESS;
}
API cuCtxPopCurrent_v2(void** out) {
  ENTER
  if (pushed.empty()) return fail(INVALID_CONTEXT, "nothing was pushed");
  *out = current;
  current = pushed.back();
  pushed.pop_back();
  return SUCCESS;
}
API cuCtxSynchronize() {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  return finish_all();
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  NEED_CONTEXT
  *total = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1 << 30));
  *free_bytes = *total - used;
  return SUCCESS;
}
static int allocate(uint64_t* out, size_t size) {
  if (!size) return fail(INVALID_VALUE, "allocation of nothing");
  if (used + size > static_cast<uint64_t>(setting("FAKE_CUDA_MEMORY", 1 << 30))) return OUT_OF_MEMORY;
  void* address = std::aligned_alloc(512, (size + 511) / 512 * 512);
  std::memset(address, 0xA5, size);  // nobody may rely on zeros
  *out = reinterpret_cast<uint64_t>(address);
  memory[*out] = size;
  used += size;
  return SUCCESS;
}
static int release(uint64_t address) {
  auto found = memory.find(address);
  if (found == memory.end()) return fail(INVALID_VALUE, "freed what is not allocated");
  used -= found->second;
  std::memset(reinterpret_cast<void*>(address), 0xDD, found->second);
  memory.erase(found);
  std::free(reinterpret_cast<void*>(address));
  return SUCCESS;
}
API cuMemAlloc_v2(uint64_t* out, size_t size) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  return allocate(out, size);
}
API cuMemFree_v2(uint64_t address) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  if (int code = finish_all()) return code;
  return release(address);
}
API cuMemAllocAsync(uint64_t* out, size_t size, void* stream) {
  NEED_CONTEXT
  if (!streams.count(stream)) return fail(INVALID_HANDLE, "cuMemAllocAsync without a stream");
  if (static_cast<Stream*>(stream)->capturing) return forbidden(__func__);  // becomes a node of the graph; not wanted
  return allocate(out, size);
}
API cuMemFreeAsync(uint64_t address, void* stream) {
  NEED_CONTEXT
  if (!memory.count(address)) return fail(INVALID_VALUE, "freed what is not allocated");
  if (streams.count(stream) && static_cast<Stream*>(stream)->capturing) return forbidden(__func__);
  return enqueue(stream, [address] { return release(address); });
}
API cuMemHostAlloc(void** out, size_t size, unsigned) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  *out = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  std::memset(*out, 0xA5, size);
  pinned[reinterpret_cast<uint64_t>(*out)] = size;
  return SUCCESS;
}
API cuMemFreeHost(void* address) {
  NEED_CONTEXT
  if (!pinned.erase(reinterpret_cast<uint64_t>(address))) return fail(INVALID_VALUE, "no pinned memory");
  if (int code = finish_all()) return code;
  std::free(address);
  return SUCCESS;
}
static int inside(uint64_t address, size_t size, const char* what) {
  return room(memory, address) >= size ? SUCCESS : fail(INVALID_VALUE, std::string(what) + " beyond an allocation");
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  if (int code = inside(to, size, __func__)) return code;
  // From pageable memory it returns once the values are staged; that they are there, only the default stream knows.
  std::string staged(static_cast<const char*>(from), size);
  return enqueue(reinterpret_cast<void*>(1), [=] {
    if (room(memory, to) < size) return fail(ILLEGAL_ADDRESS, "copied to freed memory");
    std::memcpy(reinterpret_cast<void*>(to), staged.data(), size);
    return int(SUCCESS);
  });
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  if (int code = inside(from, size, __func__)) return code;
  if (int code = run(default_streams[0].queue)) return code;
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return SUCCESS;
}
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void* stream) {
  NEED_CONTEXT
  if (int code = inside(to, size, __func__)) return code;
  if (room(pinned, reinterpret_cast<uint64_t>(from)) >= size)
    return enqueue(stream, [=] {
      if (room(memory, to) < size || room(pinned, reinterpret_cast<uint64_t>(from)) < size)
        return fail(ILLEGAL_ADDRESS, "copied to or from freed memory");
      std::memcpy(reinterpret_cast<void*>(to), from, size);
      return int(SUCCESS);
    });
  if (streams.count(stream) && static_cast<Stream*>(stream)->capturing) return forbidden("a copy from pageable memory");
  std::string staged(static_cast<const char*>(from), size);
  return enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), staged.data(), size); return int(SUCCESS); });
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
  NEED_CONTEXT
  if (int code = inside(from, size, __func__)) return code;
  bool is_pinned = room(pinned, reinterpret_cast<uint64_t>(to)) >= size;
  if (!is_pinned && streams.count(stream) && static_cast<Stream*>(stream)->capturing)
    return forbidden("a copy to pageable memory");
  return enqueue(stream, [=] {
    if (room(memory, from) < size || (is_pinned && room(pinned, reinterpret_cast<uint64_t>(to)) < size))
      return fail(ILLEGAL_ADDRESS, "copied to or from freed memory");
    std::memcpy(to, reinterpret_cast<void*>(from), size);
    return int(SUCCESS);
  });
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* stream) {
  NEED_CONTEXT
  if (int code = inside(to, size, __func__)) return code;
  if (int code = inside(from, size, __func__)) return code;
  return enqueue(stream, [=] {
    if (room(memory, from) < size || room(memory, to) < size) return fail(ILLEGAL_ADDRESS, "copied freed memory");
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    return int(SUCCESS);
  });
}
API cuMemsetD8Async(uint64_t to, unsigned char byte, size_t size, void* stream) {
  NEED_CONTEXT
  if (int code = inside(to, size, __func__)) return code;
  return enqueue(stream, [=] {
    if (room(memory, to) < size) return fail(ILLEGAL_ADDRESS, "filled freed memory");
    std::memset(reinterpret_cast<void*>(to), byte, size);
    return int(SUCCESS);
  });
}
API cuStreamCreate(void** out, unsigned flags) {
  NEED_CONTEXT
  if (flags > 1) return fail(INVALID_VALUE, "stream flags");
  *out = new Stream;
  streams.insert(*out);
  return SUCCESS;
}
API cuStreamDestroy_v2(void* stream) {
  NEED_CONTEXT
  if (!streams.count(stream)) return fail(INVALID_HANDLE, "no such stream");
  int code = run(static_cast<Stream*>(stream)->queue);
  streams.erase(stream);
  delete static_cast<Stream*>(stream);
  return code;
}
API cuStreamSynchronize(void* stream) {
  NEED_CONTEXT
  stream = resolve(stream);
  if (!streams.count(stream)) return fail(INVALID_HANDLE, "no such stream");
  if (static_cast<Stream*>(stream)->capturing) return forbidden(__func__);
  return run(static_cast<Stream*>(stream)->queue);
}
API cuStreamIsCapturing(void* stream, int* out) {
  NEED_CONTEXT
  if (!streams.count(stream)) return fail(INVALID_HANDLE, "no such stream");
  *out = static_cast<Stream*>(stream)->capturing ? 1 : 0;
  return SUCCESS;
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  NEED_CONTEXT
  if (!events.count(event)) return fail(INVALID_HANDLE, "no such event");
  // Working off the other streams as far as the event is all that waiting can mean here.
  void* own = resolve(stream);
  return enqueue(stream, [event, own] {
    auto* found = static_cast<Event*>(event);
    for (void* other : streams) {
      if (other == own) continue;
      auto& queue = static_cast<Stream*>(other)->queue;
      while (found->recorded && !found->done && !queue.empty()) {
        Work work = std::move(queue.front());
        queue.erase(queue.begin());
        if (int code = work()) return code;
      }
    }
    return int(SUCCESS);
  });
}
API cuStreamBeginCapture_v2(void* stream, int mode) {
  NEED_CONTEXT
  if (!streams.count(stream)) return fail(STREAM_CAPTURE_UNSUPPORTED, "capture of a stream that is none");
  if (mode < 0 || mode > 2) return fail(INVALID_VALUE, "capture mode");
  auto* found = static_cast<Stream*>(stream);
  if (found->capturing) return fail(STREAM_CAPTURE_UNMATCHED, "captures twice at once");
  found->capturing = true;
  found->spoilt = false;
  found->captured.clear();
  return SUCCESS;
}
API cuStreamEndCapture(void* stream, void** out) {
  NEED_CONTEXT
  *out = nullptr;
  if (!streams.count(stream) || !static_cast<Stream*>(stream)->capturing)
    return fail(STREAM_CAPTURE_UNMATCHED, "no capture");
  auto* found = static_cast<Stream*>(stream);
  found->capturing = false;
  if (found->spoilt) return fail(STREAM_CAPTURE_INVALIDATED, "the capture was spoilt");
  auto* graph = new Graph{std::move(found->captured)};
  graphs.insert(graph);
  *out = graph;
  return SUCCESS;
}
API cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long flags) {
  NEED_CONTEXT
  if (!graphs.count(graph)) return fail(INVALID_HANDLE, "no such graph");
  if (flags) return fail(INVALID_VALUE, "graph flags");
  *out = new Graph(*static_cast<Graph*>(graph));
  executables.insert(*out);
  return SUCCESS;
}
API cuGraphLaunch(void* executable, void* stream) {
  NEED_CONTEXT
  if (!executables.count(executable)) return fail(INVALID_HANDLE, "no such graph to launch");
  auto work = static_cast<Graph*>(executable)->work;
  return enqueue(stream, [work] {
    for (const Work& step : work) if (int code = step()) return code;
    return int(SUCCESS);
  });
}
API cuGraphDestroy(void* graph) {
  NEED_CONTEXT
  if (!graphs.erase(graph)) return fail(INVALID_HANDLE, "no such graph");
  delete static_cast<Graph*>(graph);
  return SUCCESS;
}
API cuGraphExecDestroy(void* executable) {
  NEED_CONTEXT
  if (!executables.erase(executable)) return fail(INVALID_HANDLE, "no such graph to launch");
  delete static_cast<Graph*>(executable);
  return SUCCESS;
}
API cuEventCreate(void** out, unsigned flags) {
  NEED_CONTEXT
  if (flags) return fail(INVALID_VALUE, "an event without timing is not used");
  *out = new Event;
  events.insert(*out);
  return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
  NEED_CONTEXT
  if (!events.erase(event)) return fail(INVALID_HANDLE, "no such event");
  return SUCCESS;  // queued records may still touch it; a stand-in may leak it
}
API cuEventRecord(void* event, void* stream) {
  NEED_CONTEXT
  if (!events.count(event)) return fail(INVALID_HANDLE, "no such event");
  auto* found = static_cast<Event*>(event);
  found->recorded = true;
  found->done = false;
  return enqueue(stream, [found] { found->done = true; found->when = now(); return int(SUCCESS); });
}
API cuEventSynchronize(void* event) {
  NEED_CONTEXT
  if (!events.count(event)) return fail(INVALID_HANDLE, "no such event");
  if (any_capture()) return forbidden(__func__);
  if (!static_cast<Event*>(event)->recorded) return SUCCESS;
  for (void* stream : streams) {
    auto& queue = static_cast<Stream*>(stream)->queue;
    while (!static_cast<Event*>(event)->done && !queue.empty()) {
      Work work = std::move(queue.front());
      queue.erase(queue.begin());
      if (int code = work()) return sticky = code;
    }
  }
  return SUCCESS;
}
API cuEventQuery(void* event) {
  NEED_CONTEXT
  if (!events.count(event)) return fail(INVALID_HANDLE, "no such event");
  if (any_capture()) return forbidden(__func__);
  auto* found = static_cast<Event*>(event);
  return found->recorded && !found->done ? int(NOT_READY) : int(SUCCESS);
}
API cuEventElapsedTime(float* out, void* from, void* to) {
  NEED_CONTEXT
  if (!events.count(from) || !events.count(to)) return fail(INVALID_HANDLE, "no such event");
  auto *first = static_cast<Event*>(from), *last = static_cast<Event*>(to);
  if (!first->recorded || !last->recorded) return fail(INVALID_HANDLE, "an event that was never recorded");
  if (!first->done || !last->done) return fail(NOT_READY, "an event that is not over");
  *out = static_cast<float>(last->when - first->when);
  return SUCCESS;
}
API cuLaunchHostFunc(void* stream, void (*function)(void*), void* user) {
  NEED_CONTEXT
  return enqueue(stream, [=] { function(user); return int(SUCCESS); });
}

// -- modules -----------------------------------------------------------------------------------------------------------

static void write_log(unsigned count, const int* options, void** values, const std::string& text) {
  char* buffer = nullptr;
  size_t size = 0;
  for (unsigned i = 0; i < count; ++i) {
    if (options[i] == 5) buffer = static_cast<char*>(values[i]);
    if (options[i] == 6) size = reinterpret_cast<size_t>(values[i]);
  }
  if (buffer && size) std::snprintf(buffer, size, "%s", text.c_str());
}
static size_t parameter_size(const std::string& type) {
  return type.size() >= 2 ? static_cast<size_t>(std::atoi(type.c_str() + type.find_first_of("0123456789"))) / 8 : 0;
}
// Entries with their parameters, in order, and the most threads that they were compiled for.
static void read_entries(Module& module) {
  const std::string& text = module.ptx;
  for (size_t at = text.find(".entry"); at != std::string::npos; at = text.find(".entry", at + 1)) {
    size_t begin = text.find_first_not_of(" \t\n", at + 6), open = text.find('(', begin), body = text.find('{', at);
    auto function = std::make_unique<Function>();
    function->module = &module;
    function->name = text.substr(begin, text.find_first_of(" \t\n(", begin) - begin);
    size_t close = open < body ? text.find(')', open) : std::string::npos;
    for (size_t p = open; open < body;) {
      p = text.find(".param", p + 1);
      if (p == std::string::npos || p > close) break;
      size_t type = text.find('.', p + 6);
      size_t aligned = text.find(".align", p);
      (void)aligned;
      while (text.compare(type, 4, ".ptr") == 0 || text.compare(type, 6, ".align") == 0) type = text.find('.', type + 1);
      function->parameters.push_back({parameter_size(text.substr(type, text.find_first_of(" \t\n", type) - type))});
    }
    size_t most = text.find(".maxntid", at);
    if (most != std::string::npos && most < body) function->most_threads = static_cast<unsigned>(std::atoi(text.c_str() + most + 8));
    Function* made = function.get();
    module.functions[made->name] = std::move(function);
    functions.insert(made);
  }
}
static std::string state_bytes(void* address, uint64_t size) { return std::string(static_cast<char*>(address), size); }
template <class Do> static void each_state(Module& module, Do work) {
  auto count = reinterpret_cast<CountStates>(dlsym(module.library, "emulated_states"));
  auto find = reinterpret_cast<FindState>(dlsym(module.library, "emulated_state"));
  for (uint32_t i = 0; count && find && i < count(); ++i) {
    const char* name;
    uint64_t size;
    void* address = find(i, &name, &size);
    work(i, address, size);
  }
}
// Loads the library of the module's source; its memory is the module's own, and zero. True where there is none at all.
static bool find_library(Module& module) {
  const char* folder = std::getenv("FAKE_CUDA_KERNELS");
  if (!folder) return true;
  char name[32];
  std::snprintf(name, sizeof name, "/%016llx.txt", static_cast<unsigned long long>(hash(module.ptx)));
  FILE* file = std::fopen((std::string(folder) + name).c_str(), "r");
  if (!file) return true;
  char line[1024], parameter[256];
  unsigned kind, granule;
  std::string path = std::fgets(line, sizeof line, file) ? line : "";
  while (std::fgets(line, sizeof line, file))
    if (std::sscanf(line, "%255s %u %u", parameter, &kind, &granule) == 3) module.known.push_back({parameter, kind, granule});
  std::fclose(file);
  if (!path.empty() && path.back() == '\n') path.pop_back();
  module.library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module.library) each_state(module, [&](uint32_t, void*, uint64_t size) { module.state.emplace_back(size, '\0'); });
  return module.library != nullptr;
}
API cuModuleLoadDataEx(void** out, const void* image, unsigned count, const int* options, void** values) {
  NEED_CONTEXT
  if (any_capture()) return forbidden(__func__);
  auto module = std::make_unique<Module>();
  module->ptx = static_cast<const char*>(image);
  const std::string& text = module->ptx;
  size_t version = text.find(".version"), target = text.find(".target sm_");
  if (version == std::string::npos || target == std::string::npos) {
    write_log(count, options, values, "ptxas application ptx input, line 1; fatal   : Missing .version directive");
    return fail(INVALID_PTX, "no PTX");
  }
  int major = 0, minor = 0, architecture = std::atoi(text.c_str() + target + 11);
  std::sscanf(text.c_str() + version, ".version %d.%d", &major, &minor);
  long isa = setting("FAKE_CUDA_ISA", 807);
  if (major * 100 + minor > isa) {
    char line[160];
    std::snprintf(line, sizeof line, "ptxas application ptx input, line 9; fatal   : Unsupported .version %d.%d; current version is '%ld.%ld'",
                  major, minor, isa / 100, isa % 100);
    write_log(count, options, values, line);
    return fail(UNSUPPORTED_PTX_VERSION, line);
  }
  if (architecture > setting("FAKE_CUDA_CAPABILITY", 89)) return fail(NO_BINARY_FOR_GPU, "PTX for a newer GPU");
  read_entries(*module);
  if (module->functions.empty()) {
    write_log(count, options, values, "ptxas application ptx input, line 12; error   : no entry");
    return fail(INVALID_PTX, "no entry");
  }
  if (!find_library(*module)) return fail(INVALID_IMAGE, "the stand-in's note on this PTX is of no use");
  *out = module.release();
  modules.insert(*out);
  return SUCCESS;
}
API cuModuleUnload(void* handle) {
  NEED_CONTEXT
  if (!modules.erase(handle)) return fail(INVALID_HANDLE, "no such module");
  if (int code = finish_all()) return code;
  auto* module = static_cast<Module*>(handle);
  for (auto& pair : module->functions) functions.erase(pair.second.get());
  if (module->library) dlclose(module->library);
  delete module;
  return SUCCESS;
}
API cuModuleGetFunction(void** out, void* handle, const char* name) {
  NEED_CONTEXT
  if (!modules.count(handle)) return fail(INVALID_HANDLE, "no such module");
  auto& known = static_cast<Module*>(handle)->functions;
  auto found = known.find(name);
  if (found == known.end()) return fail(NOT_FOUND, std::string("no kernel ") + name);
  *out = found->second.get();
  return SUCCESS;
}
API cuFuncGetAttribute(int* out, int which, void* function) {
  NEED_CONTEXT
  if (!functions.count(function)) return fail(INVALID_HANDLE, "no such function");
  *out = which == 4 ? 32 : 0;
  return SUCCESS;
}
API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  NEED_CONTEXT
  if (!functions.count(handle)) return fail(INVALID_HANDLE, "no such function");
  auto* function = static_cast<Function*>(handle);
  if (extra || by != 1 || bz != 1) return fail(INVALID_VALUE, "not used by this project");
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx) return fail(INVALID_VALUE, "an empty or too large grid");
  if (bx > function->most_threads) return fail(LAUNCH_OUT_OF_RESOURCES, "more threads than the kernel was compiled for");
  if (shared > 49152) return fail(INVALID_VALUE, "more than 48 KiB of shared memory");
  Module* module = function->module;
  auto launch = module->library ? reinterpret_cast<Launches>(dlsym(module->library, "emulated_launches")) : nullptr;
  if (!launch) return fail(NOT_FOUND, "the stand-in has no host build of this PTX");
  if (module->known.size() != function->parameters.size())
    return fail(INVALID_VALUE, "the PTX takes another number of parameters than the kernel says");
  // The driver copies the values when it is called, by the sizes that the PTX declares.
  std::vector<std::string> values;
  for (size_t i = 0; i < function->parameters.size(); ++i) {
    if (function->parameters[i].size != (module->known[i].kind == 1 ? 4u : 8u))
      return fail(INVALID_VALUE, "the PTX takes " + module->known[i].name + " as something else");
    values.emplace_back(static_cast<const char*>(parameters[i]), function->parameters[i].size);
  }
  return enqueue(stream, [=] {
    auto own = values;
    std::vector<EmulatedParameter> given;
    for (size_t i = 0; i < own.size(); ++i) {
      const Known& known = module->known[i];
      EmulatedParameter parameter{own[i].data(), 0, 0, known.name.c_str(), known.granule, known.kind};
      if (known.kind != 1) {
        std::memcpy(&parameter.address, own[i].data(), 8);
        parameter.data = reinterpret_cast<void*>(parameter.address);
        parameter.bytes = room(memory, parameter.address);
        if (!parameter.bytes) return fail(ILLEGAL_ADDRESS, "the argument " + known.name + " points to no memory");
        if (parameter.bytes == 1 && known.granule > 1) parameter.bytes = 0;  // an empty array has one byte
      }
      given.push_back(parameter);
    }
    static uint32_t seed = 0;
    Description description{{gx, gy, gz}, bx, shared, static_cast<uint32_t>(given.size()), given.data()};
    Failure failure{};
    each_state(*module, [&](uint32_t i, void* at, uint64_t size) { std::memcpy(at, module->state[i].data(), size); });
    int failed = launch(1, &description, ++seed, 0, 50000000, &failure);
    each_state(*module, [&](uint32_t i, void* at, uint64_t size) { module->state[i] = state_bytes(at, size); });
    if (!failed) return int(SUCCESS);
    return fail(LAUNCH_FAILED, std::string(failure.what) + " (line " + std::to_string(failure.line) + ")");
  });
}

// -- for the tests alone ---------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) unsigned long long fake_live(const char* what) {
  std::string name(what);
  if (name == "memory") return memory.size();
  if (name == "pinned") return pinned.size();
  if (name == "streams")
    return streams.size() - streams.count(&default_streams[0]) - streams.count(&default_streams[1]);
  if (name == "events") return events.size();
  if (name == "graphs") return graphs.size() + executables.size();
  if (name == "modules") return modules.size();
  if (name == "contexts") return static_cast<unsigned long long>(retained);
  return ~0ull;
}
