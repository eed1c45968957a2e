//! `hostile::translated` under libFuzzer.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::translated::run(data));
