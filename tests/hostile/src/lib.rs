//! What fuzzers feed: each module plays bytes against one part that reads what a guest, an image or a saved file says.
//!
//! `run(data)` never fails on its own account: it panics when the part under test is at fault. The same functions are
//! called with random bytes by `tests/targets.rs` (so they are always compiled and run) and with libFuzzer's by
//! `fuzz/` (`cargo xtask fuzz`). A run is a function of its bytes: no host time, no randomness.
//!
//! - [`board`]: a whole machine, touched everywhere ([`board::FuzzBoard`]).
//! - [`decoder`]: bytes as code in every mode.
//! - [`translated`]: the same, translated as interpreted.
//! - [`virtqueue`]: a queue over rings of noise.
//! - [`saved_vm`]: saved VMs that were tampered with.
//! - [`boot_files`]: kernels and initial RAM disks.
//! - [`qcow2`]: disk images.
#![forbid(unsafe_code)]

pub mod board;
pub mod boot_files;
pub mod decoder;
pub mod edits;
pub mod qcow2;
pub mod saved_vm;
pub mod translated;
pub mod virtqueue;

use arbitrary::{Arbitrary, Unstructured};

/// The target that a fuzzer or a test calls.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 7] = [
    ("board", board::run),
    ("decoder", decoder::run),
    ("translated", translated::run),
    ("virtqueue", virtqueue::run),
    ("saved_vm", saved_vm::run),
    ("bzimage_elf", boot_files::run),
    ("qcow2", qcow2::run),
];

/// A script out of bytes; `None` if they are too few.
fn script<'a, T: Arbitrary<'a>>(data: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(data)).ok()
}

/// At most `MAX` of them. (The crate's own way for lists flips a coin after each element.)
fn up_to<'a, const MAX: usize, T: Arbitrary<'a>>(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Vec<T>> {
    let count = bytes.int_in_range(0..=MAX)?;
    (0..count).map(|_| bytes.arbitrary()).collect()
}
