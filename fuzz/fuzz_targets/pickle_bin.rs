//! Fuzzes `readers::pickle_bin`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    arcface_fuzz::readers::pickle_bin(bytes);
});
