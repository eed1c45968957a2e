//! Every fuzz target with random bytes: `PROPTEST_CASES` or `BEDPLATE_CAMPAIGN` make it more than a few.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Runs target `name` on `cases` inputs of at most `bytes` bytes.
fn check(name: &str, cases: u32, bytes: usize) {
    let (_, run) = hostile::TARGETS.iter().find(|(target, _)| *target == name).expect("a target's name");
    let more = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    let cases = more.unwrap_or(cases);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
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
