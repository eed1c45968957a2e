//! Raw images: content, limits, locks, holes and identity.
#![allow(missing_docs)]

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use disk_formats::{Disk, DiskError, DiskSpec, open};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    (dir, path)
}

#[test]
fn what_is_written_is_read_back_and_stays() {
    let (_dir, path) = image(SIZE);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    assert_eq!((disk.size_bytes(), disk.read_only()), (SIZE, false));
    disk.write_at(b"hello", SIZE - 5).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let spec = DiskSpec { read_only: true, ..DiskSpec::new(&path) };
    let disk = open(&spec).unwrap();
    let mut buf = [0; 5];
    disk.read_at(&mut buf, SIZE - 5).unwrap();
    assert_eq!(&buf, b"hello");
    for refused in [
        disk.write_at(b"x", 0),
        disk.discard(0, 512),
        disk.write_zeroes(0, 512, true),
        disk.write_zeroes(0, 512, false),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}

#[test]
fn ranges_outside_are_refused() {
    let (_dir, path) = image(SIZE);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    for offset in [SIZE - 511, SIZE, u64::MAX - 511, u64::MAX] {
        assert_eq!(disk.read_at(&mut [0; 512], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.write_at(&[0; 512], offset).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.discard(offset, 512).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.write_zeroes(offset, 512, false).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
}

#[test]
fn a_qcow2_header_in_a_raw_disk_changes_nothing() {
    let (_dir, path) = image(SIZE);
    std::fs::File::options().write(true).open(&path).unwrap();
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    drop(disk);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    let mut magic = [0; 4];
    disk.read_at(&mut magic, 0).unwrap();
    assert_eq!((&magic, disk.size_bytes()), (b"QFI\xfb", SIZE));
}

#[test]
fn a_disk_is_not_shared_with_a_writer() {
    let (_dir, path) = image(SIZE);
    let (rw, ro) = (DiskSpec::new(&path), DiskSpec { read_only: true, ..DiskSpec::new(&path) });
    let writer = open(&rw).unwrap();
    for spec in [&rw, &ro] {
        assert!(matches!(open(spec), Err(DiskError::InUse { .. })));
    }
    drop(writer);
    let readers = (open(&ro).unwrap(), open(&ro).unwrap());
    let error = open(&rw).unwrap_err().to_string();
    assert!(error.contains("in use") && error.contains(",ro"), "{error}");
    drop(readers);
    open(&rw).unwrap();
}

#[test]
fn discarded_space_goes_back_to_the_host_unless_told_otherwise() {
    for discard in [true, false] {
        let (_dir, path) = image(SIZE);
        let disk = open(&DiskSpec { discard, ..DiskSpec::new(&path) }).unwrap();
        disk.write_at(&vec![7; SIZE as usize], 0).unwrap();
        disk.flush().unwrap();
        let full = std::fs::metadata(&path).unwrap().blocks();
        disk.discard(0, SIZE / 2).unwrap();
        disk.flush().unwrap();
        let blocks = std::fs::metadata(&path).unwrap().blocks();
        assert_eq!(blocks < full, discard, "{blocks} of {full} blocks");
        disk.write_zeroes(SIZE / 2 + 100, 1000, true).unwrap();
        let mut buf = vec![1; 1002];
        disk.read_at(&mut buf, SIZE / 2 + 99).unwrap();
        assert_eq!((buf[0], buf[1001]), (7, 7));
        assert!(buf[1..1001].iter().all(|&b| b == 0));
    }
}

#[test]
fn identity_follows_the_content_and_not_the_name() {
    let (dir, path) = image(SIZE);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(b"one", 0).unwrap();
    disk.flush().unwrap();
    let first = disk.identity().unwrap();
    drop(disk);
    assert_eq!(first.size_bytes, SIZE);

    let renamed = dir.path().join("renamed.img");
    std::fs::rename(&path, &renamed).unwrap();
    let disk = open(&DiskSpec::new(&renamed)).unwrap();
    let mut buf = [0; 512];
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(disk.identity().unwrap(), first);

    // Kernel timestamps have a grain; wait until it has passed.
    let stamp = |p: &PathBuf| std::fs::metadata(p).unwrap().modified().unwrap();
    let before = stamp(&renamed);
    while stamp(&renamed) == before {
        disk.write_at(b"two", 0).unwrap();
    }
    let second = disk.identity().unwrap();
    assert_eq!(second.uuid, first.uuid);
    assert_ne!(second.generation, first.generation);

    let copy = dir.path().join("copy.img");
    std::fs::copy(&renamed, &copy).unwrap();
    assert_ne!(open(&DiskSpec::new(&copy)).unwrap().identity().unwrap().uuid, first.uuid);
    let text = first.to_string();
    assert!(text.contains("1048576 bytes") && &text[14..15] == "8", "{text}");
}

#[test]
fn odd_sizes_and_odd_files_are_named() {
    let (dir, path) = image(1000);
    let error = open(&DiskSpec::new(&path)).unwrap_err().to_string();
    assert!(error.contains("1000 bytes") && error.contains("truncate"), "{error}");
    std::fs::write(&path, vec![9; 1000]).unwrap();
    let disk = open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();
    let mut buf = [1; 1024];
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(disk.size_bytes(), 1024);
    assert!(buf[..1000].iter().all(|&b| b == 9) && buf[1000..].iter().all(|&b| b == 0));

    let ro = |path: PathBuf| DiskSpec { read_only: true, ..DiskSpec::new(path) };
    assert!(matches!(open(&ro(dir.path().into())), Err(DiskError::NotADisk { .. })));
    assert!(matches!(open(&ro("/dev/null".into())), Err(DiskError::NotADisk { .. })));
    let error = open(&ro(dir.path().join("absent"))).unwrap_err().to_string();
    assert!(error.contains("absent") && error.contains("No such file"), "{error}");
}

/// One operation of the model test.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, u8, usize),
    Zeroes(u64, u64, bool),
    Read(u64, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..SIZE + 1000;
    prop_oneof![
        (at.clone(), any::<u8>(), 0usize..70_000).prop_map(|(a, v, l)| Op::Write(a, v, l)),
        (at.clone(), 0u64..70_000, any::<bool>()).prop_map(|(a, l, u)| Op::Zeroes(a, l, u)),
        (at, 0usize..70_000).prop_map(|(a, l)| Op::Read(a, l)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 8))]
    #[test]
    fn a_disk_behaves_like_an_array(ops in proptest::collection::vec(op(), 1..40)) {
        let (_dir, path) = image(SIZE);
        let disk = open(&DiskSpec::new(&path)).unwrap();
        let mut model = vec![0u8; SIZE as usize];
        for op in ops {
            match op {
                Op::Write(at, value, len) => {
                    let done = disk.write_at(&vec![value; len], at).is_ok();
                    let inside = at + len as u64 <= SIZE;
                    prop_assert_eq!(done, inside);
                    if inside { model[at as usize..][..len].fill(value) }
                }
                Op::Zeroes(at, len, unmap) => {
                    let done = disk.write_zeroes(at, len, unmap).is_ok();
                    let inside = at + len <= SIZE;
                    prop_assert_eq!(done, inside);
                    if inside { model[at as usize..][..len as usize].fill(0) }
                }
                Op::Read(at, len) => {
                    let mut buf = vec![0xee; len];
                    let done = disk.read_at(&mut buf, at).is_ok();
                    prop_assert_eq!(done, at + len as u64 <= SIZE);
                    if done { prop_assert!(buf == model[at as usize..][..len]) }
                }
            }
        }
    }
}

#[test]
fn disks_can_be_shared_between_threads() {
    fn check<T: Send + Sync + ?Sized>(_: &T) {}
    let (_dir, path) = image(SIZE);
    let disk: Box<dyn Disk> = open(&DiskSpec::new(&path)).unwrap();
    check(&*disk);
}
