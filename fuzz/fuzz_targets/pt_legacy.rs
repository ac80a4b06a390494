//! Fuzzes `readers::pytorch` from the corpus of one of its forms.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    arcface_fuzz::readers::pytorch(bytes);
});
