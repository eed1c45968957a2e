//! Every encoding that the host refuses is refused, and no other.

use differential::sweep;

fn sweep_of(is_32: bool) {
    let found = sweep::run(is_32).expect("the native side starts");
    println!(
        "{} encodings, {} of them hidden by the CPU model, {} otherwise on AMD's processors",
        found.cases, found.hidden, found.vendors
    );
    assert!(found.cases > 100_000, "{} encodings ran", found.cases);
    assert!(found.differences.is_empty(), "{:#?}", found.differences);
}

#[test]
fn in_64_bit_code() {
    sweep_of(false);
}

#[test]
fn in_32_bit_code() {
    sweep_of(true);
}
