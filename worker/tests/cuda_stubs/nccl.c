// An NCCL of the version that the test wants.
#include <stdlib.h>

int ncclGetVersion(int* version) {
    const char* text = getenv("STUB_NCCL");
    *version = text ? atoi(text) : 22809;
    return 0;
}
