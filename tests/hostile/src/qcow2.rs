//! qcow2 images: a small sound one with changes, or noise. Errors and wrong content are fine; panics that get out,
//! endless loops and huge allocations are not.

use crate::edits::{Edit, apply_all};
use arbitrary::Arbitrary;
use disk_formats::{Disk, DiskSpec, Format, open};
use std::path::Path;

const CLUSTER: usize = 512;
/// Size of the disk in the image.
const DISK_BYTES: u64 = 64 * CLUSTER as u64;

#[derive(Arbitrary, Debug)]
struct Script<'a> {
    noise: bool,
    read_only: bool,
    #[arbitrary(with = crate::up_to::<12, _>)]
    edits: Vec<Edit>,
    #[arbitrary(with = crate::up_to::<64, _>)]
    steps: Vec<Step>,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Step {
    Read { at: u32, bytes: u16 },
    Write { at: u32, bytes: u16 },
    Zero { at: u32, bytes: u16, unmap: bool },
    Discard { at: u32, bytes: u16 },
    Flush,
    Identity,
    Again,
}

/// Opens an image and works on it.
pub fn run(data: &[u8]) {
    let Some(script) = crate::script::<Script<'_>>(data) else { return };
    let mut image = if script.noise { script.bytes.to_vec() } else { sound() };
    apply_all(&script.edits, &mut image, 0x70);
    let file = temporary().expect("there is a place for temporary files");
    std::fs::write(file.path(), &image).expect("the temporary folder takes files");
    let spec =
        DiskSpec { format: Some(Format::Qcow2), read_only: script.read_only, ..DiskSpec::new(file.path()) };
    let mut disk = attempt(&spec);
    for step in &script.steps {
        let Some(open) = &disk else { break };
        if let Step::Again = step {
            // Its locks go with it.
            drop(disk.take());
            disk = attempt(&spec);
        } else {
            play(&**open, step);
        }
    }
}

fn attempt(spec: &DiskSpec) -> Option<Box<dyn Disk>> {
    match open(spec) {
        Ok(disk) => Some(disk),
        Err(error) => {
            assert!(error.to_string().contains("qcow2"), "an error that does not name the file: {error}");
            None
        }
    }
}

fn play(disk: &dyn Disk, step: &Step) {
    let size = disk.size_bytes();
    let place = |at: u32| u64::from(at) % size.max(1);
    match *step {
        Step::Read { at, bytes } => _ = disk.read_at(&mut vec![0; bytes.into()], place(at)),
        Step::Write { at, bytes } => _ = disk.write_at(&vec![0x5A; bytes.into()], place(at)),
        Step::Zero { at, bytes, unmap } => _ = disk.write_zeroes(place(at), bytes.into(), unmap),
        Step::Discard { at, bytes } => _ = disk.discard(place(at), bytes.into()),
        Step::Flush => _ = disk.flush(),
        Step::Identity => _ = disk.identity(),
        Step::Again => {}
    }
}

/// In memory where the host has such a folder: a fuzzer makes thousands of images.
fn temporary() -> std::io::Result<tempfile::NamedTempFile> {
    let memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("hostile-").suffix(".qcow2");
    if memory.is_dir() { builder.tempfile_in(memory) } else { builder.tempfile() }
}

/// An image of version 3 with one data cluster, one zero cluster, and clusters that are not there.
fn sound() -> Vec<u8> {
    let mut image = vec![0; 7 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9u32.to_be_bytes());
    put(24, &DISK_BYTES.to_be_bytes());
    // L1: one entry, for a table of 64 clusters.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    // Refcount table and block: all seven clusters are in use.
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..7 {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    let copied = 1u64 << 63;
    put(3 * CLUSTER, &(copied | (4 * CLUSTER as u64)).to_be_bytes());
    put(4 * CLUSTER, &(copied | (5 * CLUSTER as u64)).to_be_bytes());
    put(4 * CLUSTER + 8, &(copied | (6 * CLUSTER as u64) | 1).to_be_bytes());
    put(5 * CLUSTER, &[0xD0; CLUSTER]);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_sound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.qcow2");
        std::fs::write(&path, sound()).unwrap();
        let disk = open(&DiskSpec::new(&path)).unwrap();
        let mut bytes = vec![0; 3 * CLUSTER];
        disk.read_at(&mut bytes, 0).unwrap();
        assert_eq!((disk.size_bytes(), bytes[0], bytes[CLUSTER]), (DISK_BYTES, 0xD0, 0));
        disk.write_at(&[1; 2000], 100).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let check = std::process::Command::new("qemu-img").args(["check", "-q"]).arg(&path).status();
        assert!(check.is_ok_and(|status| status.success()));
    }
}
