//! `hostile::qcow2` under libFuzzer. Panics that `disk_formats` catches are no findings: libFuzzer's hook, which ends the
//! process at any panic, goes.
#![no_main]
libfuzzer_sys::fuzz_target!(init: drop(std::panic::take_hook()), |data: &[u8]| hostile::qcow2::run(data));
