//! The memory allocator of the program, for libtorch's tensors too: jemalloc, whose symbols stand in front of the C library's. A training
//! step allocates and frees the same hundreds of megabytes again and again. The C library's heap either gives large blocks back, and
//! then a step waits for fresh pages, or keeps them, and then holes between blocks of many sizes take a third of the tensors' memory
//! again, up to one and a half times as much (`docs/planning.md` has the measurement).
#![allow(unsafe_code)]

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What is freed stays with the process (`decay_ms:-1`; large blocks too: `oversize_threshold:0`), in one arena, so that all threads fill the same
/// holes, in huge pages. The environment's `MALLOC_CONF` goes before it.
// SAFETY: jemalloc looks for this name, and reads a pointer to a C string in it (jemalloc's manual, "Tuning"): a reference to bytes that
// end with a zero is one, and no other item has the name.
#[unsafe(export_name = "malloc_conf")]
pub static CONFIGURATION: &[u8; 78] =
    b"narenas:1,oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always\0";
