//! Every fuzz target with random bytes; a campaign's `PROPTEST_CASES` makes it more in proportion.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Runs target `name` on `cases` inputs (per 256 of proptest's own number) of at most `bytes` bytes.
fn check(name: &str, cases: u32, bytes: usize) {
    let (_, run) = hostile::TARGETS.iter().find(|(target, _)| *target == name).expect("a target's name");
    let default = ProptestConfig::default();
    let cases = (u64::from(default.cases) * u64::from(cases) / 256) as u32;
    let config = ProptestConfig { cases, failure_persistence: None, ..default };
    let input = proptest::collection::vec(any::<u8>(), 0..bytes);
    let result = TestRunner::new(config).run(&input, |data| {
        run(&data);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{name}: {error}");
    }
}

#[test]
fn board() {
    check("board", 40, 1500);
}

#[test]
fn decoder() {
    check("decoder", 200, 600);
}

#[test]
fn translated() {
    check("translated", 200, 600);
}

#[test]
fn virtqueue() {
    check("virtqueue", 2000, 1000);
}

#[test]
fn saved_vm() {
    check("saved_vm", 60, 300);
}

#[test]
fn bzimage_elf() {
    check("bzimage_elf", 300, 300);
}

#[test]
fn qcow2() {
    check("qcow2", 200, 600);
}
