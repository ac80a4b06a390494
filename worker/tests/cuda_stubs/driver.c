// A driver that says what the test wants.
#include <stdlib.h>

static int number(const char* name) {
    const char* text = getenv(name);
    return text ? atoi(text) : 0;
}

int cuDriverGetVersion(int* version) {
    *version = number("STUB_CUDA_VERSION");
    return 0;
}

int cuInit(unsigned int flags) {
    (void)flags;
    return number("STUB_CUDA_INIT");
}

// NVRTC asks for it where there is a driver, and does without.
int cuGetExportTable(const void** table, const void* id) {
    (void)id;
    *table = 0;
    return 500;
}
