//! qcow2 images against qemu-img (Debian: qemu-utils), which must agree about every byte and find no error.
#![allow(missing_docs)]

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use disk_formats::{Disk, DiskError, DiskSpec, Format, NewFile, open};
use proptest::prelude::*;

const SIZE: u64 = 8 << 20;

fn qemu_img(args: &[&str]) -> String {
    let output =
        Command::new("qemu-img").args(args).output().expect("qemu-img is needed (apt install qemu-utils)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// No errors, no leaked clusters.
fn check(path: &Path) {
    qemu_img(&["check", "-f", "qcow2", text(path)]);
}

/// What QEMU reads from an image.
fn read_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("as-raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn create(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = dir.join(name);
    let size = SIZE.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(options);
    args.extend([text(&path), size.as_str()]);
    qemu_img(&args);
    path
}

fn all(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size_bytes() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u8, usize),
    Zeroes(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    let at = || (0..SIZE / 512).prop_map(|sector| sector * 512);
    let len = || prop_oneof![(1u64..64), (64u64..1024)].prop_map(|sectors| sectors * 512);
    prop_oneof![
        5 => (at(), any::<u8>(), len()).prop_map(|(a, v, l)| Op::Write(a, v, l as usize)),
        2 => (at(), len(), any::<bool>()).prop_map(|(a, l, u)| Op::Zeroes(a, l, u)),
        1 => (at(), len()).prop_map(|(a, l)| Op::Discard(a, l)),
        1 => Just(Op::Flush),
    ]
}

/// Carries `ops` out on disk and model. What a discard leaves behind is unspecified, so the model reads it back.
fn apply(disk: &dyn Disk, model: &mut [u8], ops: &[Op]) {
    let inside = |at: u64, len: u64| at + len <= SIZE;
    for op in ops {
        match *op {
            Op::Write(at, value, len) if inside(at, len as u64) => {
                disk.write_at(&vec![value; len], at).unwrap();
                model[at as usize..][..len].fill(value);
            }
            Op::Zeroes(at, len, unmap) if inside(at, len) => {
                disk.write_zeroes(at, len, unmap).unwrap();
                model[at as usize..][..len as usize].fill(0);
            }
            Op::Discard(at, len) if inside(at, len) => {
                disk.discard(at, len).unwrap();
                disk.read_at(&mut model[at as usize..][..len as usize], at).unwrap();
            }
            Op::Flush => disk.flush().unwrap(),
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 20))]
    #[test]
    fn qemu_reads_what_we_wrote(ops in proptest::collection::vec(op(), 1..40), variant in 0usize..4) {
        let dir = tempfile::tempdir().unwrap();
        let options: &[&str] = [
            &[][..],
            &["-o", "cluster_size=512"],
            &["-o", "cluster_size=2M,refcount_bits=1"],
            &["-o", "compat=0.10"],
        ][variant];
        let path = create(dir.path(), "disk.qcow2", options);
        let mut model = vec![0; SIZE as usize];
        let disk = open(&DiskSpec::new(&path)).unwrap();
        apply(&*disk, &mut model, &ops);
        prop_assert!(all(&*disk) == model);
        disk.flush().unwrap();
        drop(disk);
        check(&path);
        prop_assert!(read_by_qemu(&path) == model);
        let disk = open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();
        prop_assert!(all(&*disk) == model);
    }

    #[test]
    fn overlays_keep_their_base_as_it_was(before in proptest::collection::vec(op(), 1..20), after in proptest::collection::vec(op(), 1..20), raw in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = if raw {
            let path = dir.path().join("disk.img");
            std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
            path
        } else {
            create(dir.path(), "disk.qcow2", &[])
        };
        let mut model = vec![0; SIZE as usize];
        let base = open(&DiskSpec::new(&path)).unwrap();
        apply(&*base, &mut model, &before);
        let saved = model.clone();
        let overlay_path = dir.path().join("overlay");
        let overlay = base.create_overlay(NewFile::create(&overlay_path).unwrap()).unwrap();
        let saved_as = base.identity().unwrap();
        prop_assert_eq!(base.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::PermissionDenied);
        apply(&*overlay, &mut model, &after);
        prop_assert!(all(&*overlay) == model);
        prop_assert!(all(&*base) == saved);
        overlay.flush().unwrap();
        drop((overlay, base));
        check(&overlay_path);
        prop_assert!(read_by_qemu(&overlay_path) == model);
        let base = open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();
        prop_assert!(all(&*base) == saved);
        prop_assert_eq!(base.opened_as(), saved_as);
    }
}

#[test]
fn identity_survives_closing_and_notices_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "disk.qcow2", &[]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(&[5; 100_352], 1_000 * 512).unwrap();
    disk.flush().unwrap();
    let identity = disk.identity().unwrap();
    assert_eq!(identity.size_bytes, SIZE);
    drop(disk);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    assert_eq!(disk.opened_as(), identity);

    let overlay_path = dir.path().join("overlay.qcow2");
    let overlay = disk.create_overlay(NewFile::create(&overlay_path).unwrap()).unwrap();
    overlay.flush().unwrap();
    let identity = overlay.identity().unwrap();
    drop((overlay, disk));
    let spec = DiskSpec { backing_allow: vec![path.clone()], ..DiskSpec::new(&overlay_path) };
    assert_eq!(open(&spec).unwrap().opened_as(), identity);
    // Somebody writes to the base: the overlay is not the same disk any more.
    let stamp = || std::fs::metadata(&path).unwrap().modified().unwrap();
    let before = stamp();
    while stamp() == before {
        let base = open(&DiskSpec::new(&path)).unwrap();
        base.write_at(&[9; 512], 0).unwrap();
        base.flush().unwrap();
    }
    let moved_on = open(&spec).unwrap().opened_as();
    assert_eq!(moved_on.uuid, identity.uuid);
    assert_ne!(moved_on.generation, identity.generation);
}

#[test]
fn backing_files_are_opened_only_when_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![3; SIZE as usize / 2]).unwrap();
    let top = dir.path().join("top.qcow2");
    let size = SIZE.to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img", text(&top), &size]);

    let error = open(&DiskSpec::new(&top)).unwrap_err();
    assert!(matches!(error, DiskError::BackingNotAllowed { .. }));
    assert!(error.to_string().contains("backing=") && error.to_string().contains("base.img"), "{error}");
    let link = dir.path().join("link.img");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let spec = DiskSpec { backing_allow: vec![link], ..DiskSpec::new(&top) };
    let disk = open(&spec).unwrap();
    let bytes = all(&*disk);
    let (below, beyond) = bytes.split_at(SIZE as usize / 2);
    assert!(below.iter().all(|&b| b == 3) && beyond.iter().all(|&b| b == 0));
    // The base is in use for reading: nobody may write to it, others may read.
    assert!(matches!(open(&DiskSpec::new(&base)), Err(DiskError::InUse { .. })));
    open(&DiskSpec { read_only: true, ..DiskSpec::new(&base) }).unwrap();
    disk.write_at(&[4; 512], 0).unwrap();
    disk.discard(0, 65536).unwrap();
    drop(disk);
    check(&top);
    assert!(std::fs::read(&base).unwrap().iter().all(|&b| b == 3));

    let nested = dir.path().join("nested.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&top), text(&nested)]);
    let spec = |allow: &[&Path]| DiskSpec {
        backing_allow: allow.iter().map(PathBuf::from).collect(),
        ..DiskSpec::new(&nested)
    };
    assert!(matches!(open(&spec(&[&top])), Err(DiskError::BackingNotAllowed { .. })));
    open(&spec(&[&top, &base])).unwrap();

    let remote = dir.path().join("remote.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "nbd://192.0.2.1/x",
        text(&remote),
        &size,
    ]);
    assert!(matches!(open(&DiskSpec::new(&remote)), Err(DiskError::Unsupported { .. })));
}

#[test]
fn qemu_and_we_respect_each_others_locks() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "disk.qcow2", &[]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    let info = Command::new("qemu-img").args(["info", text(&path)]).output().unwrap();
    assert!(!info.status.success(), "qemu-img takes a lock that we hold");
    drop(disk);
    qemu_img(&["info", text(&path)]);
}

#[test]
fn what_is_not_supported_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for (name, options, hint) in [
        ("data", "data_file=ext.raw", "convert"),
        ("subclusters", "extended_l2=on", "convert"),
        ("zstd", "compression_type=zstd", "convert"),
    ] {
        let options = options.replace("ext.raw", text(&dir.path().join("ext.raw")));
        let path = create(dir.path(), &format!("{name}.qcow2"), &["-o", &options]);
        let error = open(&DiskSpec::new(&path)).unwrap_err();
        assert!(
            matches!(error, DiskError::Unsupported { .. }) && error.to_string().contains(hint),
            "{error}"
        );
    }
    let path = create(dir.path(), "snapshots.qcow2", &[]);
    qemu_img(&["snapshot", "-c", "one", text(&path)]);
    let error = open(&DiskSpec::new(&path)).unwrap_err().to_string();
    assert!(error.contains("snapshots") && error.contains(",ro"), "{error}");
    open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();

    let raw = dir.path().join("raw.qcow2");
    std::fs::write(&raw, vec![0; 4096]).unwrap();
    let error = open(&DiskSpec::new(&raw)).unwrap_err().to_string();
    assert!(error.contains("magic") && error.contains("format=raw"), "{error}");
}

#[test]
fn compressed_images_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("source.img");
    let content: Vec<u8> = (0..SIZE as usize).map(|i| (i / 300) as u8).collect();
    std::fs::write(&raw, &content).unwrap();
    let path = dir.path().join("c.qcow2");
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&path)]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    assert!(all(&*disk) == content);
    disk.write_at(&[1; 1024], 3 * 65536 + 512).unwrap();
    disk.flush().unwrap();
    let mut model = content;
    model[3 * 65536 + 512..][..1024].fill(1);
    assert!(all(&*disk) == model);
    drop(disk);
    check(&path);
    assert!(read_by_qemu(&path) == model);
}

#[test]
fn an_overlay_replaces_nothing_and_a_failed_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "disk.qcow2", &[]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "precious").unwrap();
    let error = NewFile::create(&taken).unwrap_err().to_string();
    assert!(error.contains("must not exist"), "{error}");
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    let file = File::options().read(true).write(true).open(&taken).unwrap();
    let error = disk.create_overlay(NewFile { file, path: taken.clone() }).unwrap_err().to_string();
    assert!(error.contains("no new, empty file"), "{error}");
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    disk.write_at(&[1; 512], 0).unwrap();
    drop(disk);
    let disk = open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();
    assert_eq!(disk.format(), Format::Qcow2);
    let before = std::fs::read(&path).unwrap();
    let overlay = disk.create_overlay(NewFile::create(&dir.path().join("x")).unwrap()).unwrap();
    assert!(disk.read_only() && !overlay.read_only(), "a disk that is only read can have an overlay");
    overlay.write_at(&[2; 512], 0).unwrap();
    overlay.flush().unwrap();
    let mut sector = [0; 512];
    overlay.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [2; 512]);
    disk.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [1; 512]);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
