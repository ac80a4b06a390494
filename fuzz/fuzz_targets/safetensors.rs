//! Fuzzes `readers::safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    arcface_fuzz::readers::safetensors(bytes);
});
