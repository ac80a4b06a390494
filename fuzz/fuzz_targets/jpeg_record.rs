//! Fuzzes `readers::jpeg_record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    arcface_fuzz::readers::jpeg_record(bytes);
});
