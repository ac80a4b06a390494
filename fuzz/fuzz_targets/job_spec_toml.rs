//! Fuzzes the coordinator's reading of job files.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| drop(arcface_fuzz::coordinator::spec::parse(text, &[])));
