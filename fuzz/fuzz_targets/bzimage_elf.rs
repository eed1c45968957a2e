//! `hostile::boot_files` under libFuzzer.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::boot_files::run(data));
