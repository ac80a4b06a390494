//! Everything random of a simulation comes from its seed: also the states of hash maps and of `tokio::select!`, and
//! the bits of UUIDs, which all ask the C library's `getrandom`. Linked into this test alone, ours answers in its place:
//! from the seed on a thread that simulates, from the kernel on all others.
#![allow(unsafe_code)]

use std::{cell::RefCell, fs::File, io::Read};

/// A small generator of good bits (splitmix64): the same on every platform and in every version of every crate.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`, at least 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// From `lo` to `hi`, both included.
    pub fn between(&mut self, lo: u64, hi: u64) -> u64 {
        lo + self.below(hi - lo + 1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

thread_local! {
    static BITS: RefCell<Option<Rng>> = const { RefCell::new(None) };
}

/// Runs `work` on a thread of its own, where all randomness follows from `seed`.
pub fn with_seed<T: Send + 'static>(seed: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    // A new thread: hash maps draw their keys once a thread.
    let thread = std::thread::spawn(move || {
        BITS.set(Some(Rng::new(seed ^ 0xA5A5_5A5A_1234_4321)));
        let result = work();
        BITS.set(None);
        result
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The C library's function, for this executable.
///
/// # Safety
/// `buffer` points to `bytes` writable bytes, or `bytes` is 0.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, bytes: usize, _flags: u32) -> isize {
    if bytes == 0 || buffer.is_null() {
        return 0;
    }
    // SAFETY: the caller's promise, checked for null above.
    let out = unsafe { std::slice::from_raw_parts_mut(buffer, bytes) };
    let seeded = BITS.try_with(|rng| {
        rng.borrow_mut().as_mut().map(|rng| {
            for chunk in out.chunks_mut(8) {
                chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
            }
        })
    });
    match seeded {
        Ok(Some(())) => bytes as isize,
        _ => match File::open("/dev/urandom").and_then(|mut file| file.read_exact(out)) {
            Ok(()) => bytes as isize,
            Err(_) => -1,
        },
    }
}
