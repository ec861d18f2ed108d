/* What TensorRT's Python bindings import from libnvinfer, its plugins and its parser, taken from a library that exports
 * some of it: the lean runtime has a plugin registry. Compiled under the names of all three; what is missing is null. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void* behind(const char* name) {
    static void* library;
    if (!library) library = dlopen(getenv("REGISTRY_LIBRARY"), RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
    return dlsym(library, name);
}

#define FORWARD(name)                                                              \
    void* name(void* a, void* b, void* c) {                                        \
        void* (*found)(void*, void*, void*) = (void* (*)(void*, void*, void*))behind(#name); \
        return found ? found(a, b, c) : 0;                                         \
    }

FORWARD(createInferBuilder_INTERNAL)
FORWARD(createInferRefitter_INTERNAL)
FORWARD(createInferRuntime_INTERNAL)
FORWARD(getBuilderPluginRegistry)
FORWARD(getPluginRegistry)

void* createNvOnnxParser_INTERNAL(void* a, void* b, int c) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* a, void* b, int c) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void* a, const char* b) { return 0; }
