// A stream of the stand-ins: the driver's or a test's makes it, NCCL's works on it. Tests in Rust lay it out the same.
#include <stdatomic.h>
#include <stdint.h>

// What becomes of the next operation.
enum {
    FAULT_NONE,
    // It never ends.
    FAULT_HANG,
    // An asynchronous error of this rank's GPU.
    FAULT_CUDA,
    // An asynchronous error of a peer.
    FAULT_REMOTE,
    // The call itself fails.
    FAULT_REFUSE,
    // The call does not return before the communicator is aborted.
    FAULT_STUCK,
};

struct stream {
    // Operations that NCCL was given and that are done.
    _Atomic uint64_t enqueued, completed;
    // Events of what is computed that it was told to wait for.
    _Atomic uint64_t waits;
    _Atomic uint32_t fault;
};
