//! What every device must survive: `device_conformance!` makes these tests for one.

use crate::{Device, StateBlob};
use alloc::vec::Vec;

/// Runs `check` on fresh devices: save → restore → save is equal, reset is like fresh, cut and flipped
/// states never panic and leave the device as after reset when they are refused, every offset × width is
/// answered.
///
/// `regions` are the sizes of the device's regions in bytes (the first 4 KiB of each are tried).
pub fn check<D: Device>(mut fresh: impl FnMut() -> D, regions: &[u64], stir: impl Fn(&mut D)) {
    let fresh_state = save(&fresh());

    let mut stirred = fresh();
    stir(&mut stirred);
    let saved = save(&stirred);
    let mut copy = fresh();
    copy.restore(&saved).expect("a state that was just saved");
    assert_eq!(save(&copy), saved, "save, restore, save");

    stirred.reset();
    assert_eq!(save(&stirred), fresh_state, "reset is not like fresh");

    hostile_states(&mut fresh, &saved);
    every_register(&mut fresh(), regions);
}

fn save(device: &impl Device) -> StateBlob {
    device.save().expect("this device can be saved")
}

fn hostile_states<D: Device>(fresh: &mut impl FnMut() -> D, saved: &StateBlob) {
    let mut device = fresh();
    for cut in 0..saved.data.len().min(4096) {
        device.restore(saved).expect("a state that was just saved");
        let blob = StateBlob { data: saved.data[..cut].to_vec(), ..saved.clone() };
        if device.restore(&blob).is_err() {
            refused(&mut device);
        }
    }
    for at in 0..saved.data.len().min(4096) {
        for bit in 0..8 {
            let mut data: Vec<u8> = saved.data.clone();
            data[at] ^= 1 << bit;
            if device.restore(&StateBlob { data, ..saved.clone() }).is_ok() {
                every_register(&mut device, &[64]);
                device.poll();
            } else {
                refused(&mut device);
            }
        }
    }
    let other = StateBlob { kind: "no such kind".into(), ..saved.clone() };
    assert!(device.restore(&other).is_err(), "took the state of another kind");
    refused(&mut device);
}

/// What [`Device::restore`] promises of an error: the device is as after reset.
fn refused(device: &mut impl Device) {
    let left = save(device);
    device.reset();
    assert_eq!(left, save(device), "a refused state leaves traces");
}

fn every_register(device: &mut impl Device, regions: &[u64]) {
    let Some(io) = device.as_io() else { return };
    for (region, bytes) in regions.iter().enumerate() {
        for offset in 0..(*bytes).min(4096) {
            for width in [1u64, 2, 4, 8] {
                if offset + width > *bytes {
                    continue;
                }
                let mut data = [0xFF; 8];
                let data = &mut data[..width as usize];
                let _ = io.io_read(region, offset, data);
                for value in [0u64, u64::MAX, 0x5A5A_5A5A_5A5A_5A5A] {
                    crate::write_le(data, value);
                    let _ = io.io_write(region, offset, data);
                }
            }
        }
    }
}

/// Conformance tests of one device: `device_conformance!(name, || fresh_device(), &[region bytes], |d| stir)`.
#[macro_export]
macro_rules! device_conformance {
    ($name:ident, $fresh:expr, $regions:expr, $stir:expr) => {
        #[test]
        fn $name() {
            $crate::conformance::check($fresh, $regions, $stir);
        }
    };
}
