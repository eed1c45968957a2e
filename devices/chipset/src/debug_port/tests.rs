//! The debug port.

use super::*;
use crate::testing::{Access, golden};

#[test]
fn keeps_the_last_value() {
    let mut p = DebugPort::new("port80");
    p.outb(0, 0, 0x5A);
    assert_eq!((p.inb(0, 0), p.last()), (0x5A, 0x5A));
}

#[test]
fn golden_bytes_of_version_1() {
    let mut p = DebugPort::new("port80");
    p.outb(0, 0, 0x5A);
    golden(&p.save().unwrap(), "0100010000005a");
}

device::device_conformance!(conformance, || DebugPort::new("port80"), &[1], |p: &mut DebugPort| p
    .outb(0, 0, 1));
