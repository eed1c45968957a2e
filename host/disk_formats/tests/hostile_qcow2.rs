//! Malformed qcow2 images: cut, bit-flipped, with absurd lengths. An error or a wrong content is fine; a panic that gets
//! out, a hang, or a huge allocation is not.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::sync::OnceLock;

use disk_formats::{Disk, DiskSpec, Format, open};
use proptest::prelude::*;

/// The largest address space this process ever had, in bytes: shows allocations that are never touched, too.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The peak before any image was opened. Tests run on threads, whose stacks and heaps are within the allowance.
fn first_peak() -> u64 {
    static FIRST: OnceLock<u64> = OnceLock::new();
    *FIRST.get_or_init(peak_bytes)
}

const SIZE: u64 = 1 << 20;

/// A small image with data, zero and unallocated clusters.
fn good() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("good.qcow2");
        let created = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"])
            .arg(&path)
            .arg(SIZE.to_string())
            .status()
            .unwrap();
        assert!(created.success());
        let disk = open(&DiskSpec::new(&path)).unwrap();
        disk.write_at(&[1; 50_000], 512).unwrap();
        disk.write_at(&[2; 5_000], 700_000).unwrap();
        disk.write_zeroes(8192, 8192, false).unwrap();
        disk.flush().unwrap();
        drop(disk);
        std::fs::read(&path).unwrap()
    })
}

fn use_it(disk: &dyn Disk) {
    let size = disk.size_bytes();
    let mut buf = vec![0; 70_000];
    for at in [0, 512, 65_536, 700_000, size.saturating_sub(70_000)] {
        let _ = disk.read_at(&mut buf, at);
        let _ = disk.write_at(&buf[..4096], at);
    }
    let _ = disk.write_zeroes(0, 65_536, true);
    let _ = disk.discard(4096, 65_536);
    let _ = disk.flush();
}

fn try_image(bytes: &[u8], read_only: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    let spec = DiskSpec { format: Some(Format::Qcow2), read_only, ..DiskSpec::new(&path) };
    let first = first_peak();
    match open(&spec) {
        Ok(disk) => use_it(&*disk),
        Err(error) => assert!(error.to_string().contains("image"), "{error}"),
    }
    let grown = peak_bytes() - first;
    assert!(grown <= 512 << 20, "{grown} bytes more for an image of {}", bytes.len());
}

proptest! {
    #[test]
    fn flipped_and_cut_images_are_survived(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..8),
        header_flips in proptest::collection::vec((0usize..120, 0u8..8), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        read_only in any::<bool>(),
    ) {
        let mut bytes = good().to_vec();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        for (at, bit) in header_flips {
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        try_image(&bytes, read_only);
    }

    #[test]
    fn absurd_fields_are_survived(
        fields in proptest::collection::vec((0usize..14, prop_oneof![any::<u64>(), Just(u64::MAX), 0u64..65_536, (0u32..64).prop_map(|b| 1 << b)]), 1..4),
        tables in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..6),
        read_only in any::<bool>(),
    ) {
        // Offset and width of every field behind the version.
        const FIELDS: [(usize, usize); 14] = [
            (8, 8), (16, 4), (20, 4), (24, 8), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (80, 8), (88, 8), (96, 4), (100, 4),
        ];
        let mut bytes = good().to_vec();
        for (field, value) in fields {
            let (at, width) = FIELDS[field];
            bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
        for (at, value) in tables {
            let at = at.index(bytes.len() / 8) * 8;
            if at >= 112 {
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
            }
        }
        try_image(&bytes, read_only);
    }
}

#[test]
fn absurd_table_sizes_are_refused_by_name() {
    for (at, width, value, field) in [
        (36, 4, 0xffff_ffffu64, "l1_size"),
        (36, 4, 0, "l1_size"),
        (56, 4, 0xffff_ffff, "refcount_table_clusters"),
        (56, 4, 0, "refcount_table_clusters"),
        (40, 8, 1 << 60, "l1_table_offset"),
        (40, 8, 4097, "l1_table_offset"),
        (48, 8, u64::MAX, "refcount_table_offset"),
        (20, 4, 63, "cluster_bits"),
        (24, 8, u64::MAX, "size"),
        (24, 8, 1 << 62, "l1_size"),
        (100, 4, 0xffff_fff8, "header_length"),
        (96, 4, 7, "refcount_order"),
        (72, 8, 1, "dirty bit"),
        (4, 4, 4, "version"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let mut bytes = good().to_vec();
        bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        std::fs::write(&path, &bytes).unwrap();
        let error = open(&DiskSpec::new(&path)).unwrap_err().to_string();
        assert!(error.contains(&format!("{field}: ")) && error.contains("image.qcow2"), "{field}: {error}");
    }
}

/// Space would be given out where the header is; and a refcount block at offset 0 reads as none, so that the search for
/// room for it never ended (imago overflowed its stack, which nothing catches).
#[test]
fn an_image_whose_header_is_not_counted_is_never_written() {
    let table = u64::from_be_bytes(good()[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(good()[table..table + 8].try_into().unwrap()) as usize;
    for (at, bytes, field) in [
        (table, &[0; 8][..], "refcount_table"),
        (table, &u64::MAX.to_be_bytes()[..], "refcount_table"),
        (table, &(1u64 << 40).to_be_bytes()[..], "refcount_table"),
        (block, &[0; 2][..], "refcounts"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let mut image = good().to_vec();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &image).unwrap();
        let opened = open(&DiskSpec::new(&path));
        if let Ok(disk) = &opened {
            use_it(&**disk);
        }
        let error = opened.unwrap_err().to_string();
        assert!(error.contains(&format!("{field}: ")), "{error}");
        // To look at, it is good enough.
        let disk = open(&DiskSpec { read_only: true, ..DiskSpec::new(&path) }).unwrap();
        let mut first = [0; 1024];
        disk.read_at(&mut first, 0).unwrap();
        assert_eq!((first[0], first[512]), (0, 1));
    }
}

#[test]
fn a_chain_that_leads_back_to_itself_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loop.qcow2");
    let mut image = good().to_vec();
    // No header extensions; the name behind them.
    image[104..120].fill(0);
    image[8..16].copy_from_slice(&120u64.to_be_bytes());
    image[16..20].copy_from_slice(&10u32.to_be_bytes());
    image[120..130].copy_from_slice(b"loop.qcow2");
    std::fs::write(&path, &image).unwrap();
    let spec = DiskSpec { read_only: true, backing_allow: vec![path.clone()], ..DiskSpec::new(&path) };
    let error = open(&spec).unwrap_err().to_string();
    assert!(error.contains("backing chain: more than 16 images"), "{error}");
}
