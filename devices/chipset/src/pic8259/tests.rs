//! The 8259 pair: priorities, cascade, spurious requests, modes, and INTR against what an acknowledge finds.

use super::*;
use crate::testing::{Access, LineLog, golden};
use proptest::prelude::*;

fn pic() -> (Pic8259, LineLog) {
    let log = LineLog::default();
    (Pic8259::new("pic", log.line(0)), log)
}

/// As Linux does: vectors 0x30 and 0x38, all unmasked.
fn ready() -> (Pic8259, LineLog) {
    let (mut p, log) = pic();
    for (region, base, cascade) in [(0, 0x30, 4), (1, 0x38, 2)] {
        p.outb(region, 0, 0x11);
        for data in [base, cascade, 1, 0] {
            p.outb(region, 1, data);
        }
    }
    (p, log)
}

#[test]
fn nests_by_priority() {
    let (mut p, log) = ready();
    p.set_level(4, true);
    p.set_level(4, false);
    assert!(log.level(0), "edges are latched");
    assert_eq!((p.acknowledge(), log.level(0)), (0x34, false));
    p.set_level(5, true);
    assert!(!log.level(0), "lower priority waits");
    p.set_level(0, true);
    assert_eq!(p.acknowledge_line(), Acknowledged { vector: 0x30, line: Some(0) });
    p.outb(0, 0, 0x0B);
    assert_eq!(p.inb(0, 0), 0x11);
    p.outb(0, 0, 0x20);
    p.outb(0, 0, 0x64);
    assert!(log.level(0));
    assert_eq!((p.acknowledge(), p.inb(0, 0)), (0x35, 0x20));
    p.outb(0, 0, 0x0A);
    p.set_level(3, true);
    assert_eq!(p.inb(0, 0), 0x08);
    p.outb(0, 1, 0x08);
    assert_eq!((p.inb(0, 1), log.level(0)), (8, false));
}

#[test]
fn cascades() {
    let (mut p, log) = ready();
    p.set_level(12, true);
    p.set_level(8, true);
    assert_eq!(p.acknowledge_line(), Acknowledged { vector: 0x38, line: Some(8) });
    p.set_level(3, true);
    assert!(!log.level(0), "the second's outrank input 3");
    p.outb(1, 0, 0x20);
    assert!(!log.level(0), "input 2 of the first is in service");
    p.outb(0, 0, 0x20);
    assert_eq!(p.acknowledge(), 0x3C);
}

#[test]
fn spurious_when_the_request_has_gone() {
    let (mut p, log) = ready();
    assert_eq!(p.acknowledge_line(), Acknowledged { vector: 0x37, line: None });
    p.put(2, 0, 2, 0xFFFF).unwrap();
    assert_eq!(p.get(2, 0, 2), 0xDEF8);
    p.set_level(10, true);
    assert!(log.level(0));
    p.set_level(10, false);
    assert!(!log.level(0), "a level-triggered request goes with its line");
    p.set_level(5, true);
    assert_eq!(p.acknowledge(), 0x35);
    p.outb(0, 0, 0x20);
    assert!(log.level(0), "still asserted");
}

#[test]
fn rotation_special_mask_auto_eoi_and_poll() {
    let (mut p, _) = ready();
    p.set_level(3, true);
    p.acknowledge();
    p.outb(0, 0, 0xA0); // non-specific EOI with rotation: 4 is first now
    p.set_level(1, true);
    p.set_level(5, true);
    assert_eq!(p.acknowledge(), 0x35);
    p.outb(0, 0, 0x68); // special mask mode
    p.outb(0, 1, 0x20); // masking 5 lets the others in
    assert_eq!(p.acknowledge(), 0x31);
    let (mut p, log) = ready();
    p.outb(0, 0, 0x11);
    [0x30, 4, 3, 0].iter().for_each(|d| p.outb(0, 1, *d));
    p.set_level(6, true);
    assert_eq!(p.acknowledge(), 0x36);
    p.set_level(7, true);
    assert!(log.level(0), "nothing is in service");
    p.outb(0, 0, 0x0C);
    assert_eq!((p.inb(0, 0), p.inb(0, 0), log.level(0)), (0x87, 0, false));
}

#[test]
fn initialization_forgets_edges_but_not_levels() {
    let (mut p, log) = ready();
    p.set_level(1, true);
    p.outb(0, 0, 0x11);
    [0x20, 4, 1].iter().for_each(|d| p.outb(0, 1, *d));
    assert!(!log.level(0), "the input must fall and rise again");
    p.set_level(1, true);
    assert!(!log.level(0));
    p.set_level(1, false);
    p.set_level(1, true);
    assert_eq!(p.acknowledge(), 0x21);
    p.outb(0, 0, 0x12);
    p.outb(0, 1, 0x40);
    p.outb(0, 1, 0xFF);
    assert_eq!((p.inb(0, 1), p.acknowledge()), (0xFF, 0x47), "single, without ICW4");
}

fn stir(p: &mut Pic8259) {
    let (mut other, _) = ready();
    core::mem::swap(&mut p.chips, &mut other.chips);
    p.put(2, 0, 2, 0x0820).unwrap();
    p.outb(0, 0, 0xC1);
    p.outb(1, 1, 0x40);
    for line in [4, 9, 11] {
        p.set_level(line, true);
    }
    p.acknowledge();
    p.set_level(4, false);
    p.set_level(9, false);
}

#[test]
fn golden_bytes_of_version_1() {
    let (mut p, _) = pic();
    stir(&mut p);
    golden(
        &p.save().unwrap(),
        "01002a000000020001000000100300010000000405000100000020060001000000300700010000000209000100000001
         020031000000010001000000080200010000000803000100000002040001000000400500010000000806000100000038
         09000100000001",
    );
}

device::device_conformance!(conformance, || pic().0, &[2, 2, 2], |p: &mut Pic8259| {
    stir(p);
    p.set_level(11, false);
});

proptest! {
    /// INTR is high exactly when an acknowledge cycle would find a request; one found is in service.
    #[test]
    fn random_traffic(steps in proptest::collection::vec((0u8..5, 0u32..18, any::<u8>()), 0..300)) {
        let (mut p, log) = ready();
        for (what, line, value) in steps {
            match what {
                0 | 1 => p.set_level(line, what == 1),
                2 => p.outb(line as usize % 3, u64::from(line & 1), value),
                3 => { p.inb(line as usize % 3, u64::from(line & 1)); }
                _ => {
                    let asked = p.output.level();
                    let got = p.acknowledge_line();
                    prop_assert_eq!(asked, got.line.is_some());
                }
            }
            prop_assert_eq!(log.level(0), p.output.level());
            let blob = p.save().unwrap();
            let (mut copy, edges) = pic();
            copy.restore(&blob).unwrap();
            prop_assert_eq!(copy.save().unwrap(), blob);
            prop_assert_eq!((copy.output.level(), edges.take_edges(0)), (p.output.level(), 0));
        }
    }
}
