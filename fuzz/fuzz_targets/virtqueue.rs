//! `hostile::virtqueue` under libFuzzer.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::virtqueue::run(data));
