//! `hostile::saved_vm` under libFuzzer.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::saved_vm::run(data));
