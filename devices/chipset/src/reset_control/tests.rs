//! The reset control register.

use super::*;
use crate::testing::{Access, RequestLog, golden};

fn control() -> (ResetControl, Arc<RequestLog>) {
    let requests = Arc::new(RequestLog::default());
    (ResetControl::new("reset", requests.clone()), requests)
}

#[test]
fn resets_on_the_rising_bit() {
    let (mut c, requests) = control();
    c.outb(0, 0, 0x02);
    assert_eq!(requests.0.lock().1, 0);
    c.outb(0, 0, 0x06);
    c.outb(0, 0, 0x0E);
    assert_eq!((requests.0.lock().1, c.inb(0, 0)), (1, 0x0E));
    c.outb(0, 0, 0);
    c.outb(0, 0, 0xFF);
    assert_eq!((requests.0.lock().1, c.inb(0, 0)), (2, 0x0E));
}

#[test]
fn golden_bytes_of_version_1() {
    let (mut c, _) = control();
    c.outb(0, 0, 2);
    golden(&c.save().unwrap(), "01000100000002");
}

device::device_conformance!(conformance, || control().0, &[1], |c: &mut ResetControl| c.outb(0, 0, 0x0A));
