//! Port 92h.

use super::*;
use crate::testing::{Access, RequestLog, golden};

fn port() -> (Port92, Arc<RequestLog>) {
    let requests = Arc::new(RequestLog::default());
    (Port92::new("port92", requests.clone()), requests)
}

#[test]
fn a20_is_kept_and_reset_rises() {
    let (mut p, requests) = port();
    assert_eq!(p.inb(0, 0), 2);
    p.outb(0, 0, 0xFC);
    assert_eq!((p.inb(0, 0), requests.0.lock().1), (0, 0));
    p.outb(0, 0, 3);
    p.outb(0, 0, 1);
    assert_eq!((p.inb(0, 0), requests.0.lock().1), (1, 1));
}

#[test]
fn golden_bytes_of_version_1() {
    golden(&port().0.save().unwrap(), "01000100000002");
}

device::device_conformance!(conformance, || port().0, &[1], |p: &mut Port92| p.outb(0, 0, 0));
