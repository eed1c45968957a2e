//! Tests of the saved VM's file format.

use super::*;
use alloc::string::ToString;
use guest_memory::{GuestRam, Region};
use proptest::prelude::*;

const RAM_BYTES: u64 = 0x12_0000;

fn sample(compress: bool) -> (GuestRam, Vec<u8>) {
    let ram = GuestRam::for_test(RAM_BYTES);
    ram.store_bytes(0x1000, b"first");
    ram.fill_bytes(0x10_0000, 0xA5, 0x3000);
    ram.store_bytes(RAM_BYTES - 1, &[7]);
    let mut out = Vec::new();
    let mut w = Writer::begin(&mut out).unwrap();
    let shape = SavedRam { span_bytes: ram.span_bytes(), regions: ram.regions().to_vec() };
    w.state(*b"RAM ", CRITICAL, &shape).unwrap();
    w.record(*b"note", 0, b"skip me").unwrap();
    let blob = saved_state::to_blob(&SavedClock { guest_ns: 5, wall_ns: 6 });
    w.named(*b"DEV ", "clock0", blob).unwrap();
    let mut looked = 0;
    RamSaver { compress }.save(&ram, &[0..0x2000, 0x10_0000..RAM_BYTES], &mut w, |n| looked = n).unwrap();
    assert_eq!(looked, RAM_BYTES);
    w.finish().unwrap();
    (ram, out)
}

fn load(mut bytes: &[u8]) -> Result<GuestRam, LoadError> {
    let ram = GuestRam::for_test(RAM_BYTES);
    let mut reader = Reader::begin(&mut bytes)?;
    while let Some(record) = reader.next_record()? {
        match &record.kind {
            b"RAM " => record.state::<SavedRam>()?.must_be(&SavedRam {
                span_bytes: RAM_BYTES,
                regions: alloc::vec![Region { gpa: 0, bytes: RAM_BYTES, offset: 0 }],
            })?,
            b"DEV " => assert_eq!(record.state::<SavedBlob>()?.name, "clock0"),
            b"PAGE" => restore_pages(&ram, &record)?,
            _ => record.skip()?,
        }
    }
    Ok(ram)
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = zeroes(ram.span_bytes() as usize);
    ram.load_bytes(0, &mut bytes);
    bytes
}

#[test]
fn what_was_saved_comes_back_small() {
    for compress in [false, true] {
        let (ram, bytes) = sample(compress);
        assert!(bytes.len() < if compress { 1200 } else { 6 * PAGE_BYTES }, "{}", bytes.len());
        assert!(content(&load(&bytes).unwrap()) == content(&ram));
    }
}

#[test]
fn every_cut_is_refused() {
    let (_, bytes) = sample(true);
    for cut in 0..bytes.len() {
        assert!(load(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let (_, bytes) = sample(true);
    let mut bytes = bytes;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(load(&bytes).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn unknown_records_are_skipped_unless_critical() {
    let stream = |flags| {
        let mut out = Vec::new();
        let mut w = Writer::begin(&mut out).unwrap();
        w.record(*b"new!", flags, &[]).unwrap();
        w.finish().unwrap();
        out
    };
    load(&stream(0)).unwrap();
    let error = load(&stream(CRITICAL)).unwrap_err().to_string();
    assert!(error.contains("`new!`"), "{error}");
}

/// [`SavedClock`] as a later version may write it.
struct NewerClock;

impl SavedState for NewerClock {
    const KIND: &'static str = SavedClock::KIND;
    const VERSION: u32 = SavedClock::VERSION + 1;
    fn encode(&self, w: &mut saved_state::FieldWriter) {
        w.uint(1, 5u8);
    }
    fn decode(_: &mut saved_state::Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self)
    }
}

#[test]
fn a_newer_record_is_refused() {
    let mut out = Vec::new();
    let mut w = Writer::begin(&mut out).unwrap();
    w.state(*b"TIME", CRITICAL, &NewerClock).unwrap();
    w.finish().unwrap();
    let mut source = &out[..];
    let record = Reader::begin(&mut source).unwrap().next_record().unwrap().unwrap();
    record.state::<NewerClock>().unwrap();
    let error = record.state::<SavedClock>().unwrap_err().to_string();
    assert!(error.contains("`clock` has version 2; this version reads up to 1"), "{error}");
}

#[test]
fn lies_about_pages_are_refused() {
    let ram = GuestRam::for_test(0x2000);
    let record = |first: u64, bits: u8, pages: &[u8], flags| {
        let mut body = first.to_le_bytes().to_vec();
        body.push(bits);
        body.extend_from_slice(&[0; 31]);
        body.extend_from_slice(pages);
        Record { kind: *b"PAGE", flags, version: 0, body }
    };
    restore_pages(&ram, &record(1, 1, &[1; 4096], CRITICAL)).unwrap();
    assert_eq!(ram.load::<u16>(0x1000), 0x0101);
    for bad in [
        record(2, 1, &[1; 4096], CRITICAL),
        record(u64::MAX, 3, &[1; 8192], CRITICAL),
        record(u64::MAX / 4096, 1, &[1; 4096], CRITICAL),
        record(0, 3, &[1; 4096], CRITICAL),
        record(0, 0, &[1; 4096], CRITICAL),
        record(0, 1, &[1; 4096], CRITICAL | 2),
        Record { kind: *b"PAGE", flags: 0, version: 0, body: alloc::vec![0; 39] },
    ] {
        assert!(restore_pages(&ram, &bad).is_err());
    }
}

/// The bytes of format 1 for ever: what this version wrote, every later one reads.
#[test]
fn golden_bytes() {
    let mut out = Vec::new();
    let mut w = Writer::begin(&mut out).unwrap();
    w.state(*b"TIME", CRITICAL, &SavedClock { guest_ns: 0x0102, wall_ns: 3 }).unwrap();
    w.named(*b"DEV ", "uart0", saved_state::StateBlob { kind: "u".into(), version: 1, data: alloc::vec![9] })
        .unwrap();
    w.finish().unwrap();
    let hex: alloc::string::String = out.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, GOLDEN);
}

const GOLDEN: &str = "424544504c41544501000000\
    54494d45010001000f00000063173e7d010002000000020102000100000003\
    444556200100010020000000a966d6f60100050000007561727430020001000000750300010000000104000100000009\
    454e442001000000080000004d893fe20200000000000000";

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut stream = MAGIC.to_vec();
        stream.extend_from_slice(&VERSION.to_le_bytes());
        stream.extend_from_slice(&bytes);
        let _ = load(&stream);
        let _ = restore_pages(&GuestRam::for_test(0x1000), &Record { kind: *b"PAGE", flags: 2, version: 0, body: bytes });
    }
}
