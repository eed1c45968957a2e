//! Tests of the field format: golden bytes, refusals, hostile blobs.

use super::*;
use alloc::vec;
use proptest::prelude::*;

#[derive(Debug, Clone, PartialEq, Default)]
struct Inner {
    a: u16,
}
impl SavedState for Inner {
    const KIND: &'static str = "inner";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { a } = self;
        w.uint(1, *a);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { a: r.uint(1)? })
    }
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Sample {
    count: u32,
    on: bool,
    name: String,
    values: Vec<u64>,
    raw: [u8; 3],
    inner: Inner,
    list: Vec<Inner>,
}
impl SavedState for Sample {
    const KIND: &'static str = "sample";
    const VERSION: u32 = 2;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { count, on, name, values, raw, inner, list } = self;
        w.uint(1 | CRITICAL, *count).flag(2, *on).text(3, name).uints(4, values.iter().copied());
        w.bytes(5, raw).nested(6, inner).list(7, list);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self {
            count: r.uint(1 | CRITICAL)?,
            on: r.flag(2)?,
            name: r.text(3, 64)?,
            values: r.uints(4, 16)?,
            raw: r.array(5)?,
            inner: r.nested(6)?.unwrap_or_default(),
            list: r.list(7, 8)?,
        })
    }
}

fn sample() -> Sample {
    Sample {
        count: 0x1234,
        on: true,
        name: "disk".into(),
        values: vec![1, u64::MAX],
        raw: [7, 8, 9],
        inner: Inner { a: 5 },
        list: vec![Inner { a: 1 }, Inner { a: 0 }],
    }
}

#[test]
fn golden_bytes_of_version_1_of_the_format() {
    let hex = |data: &[u8]| data.iter().map(|b| alloc::format!("{b:02x}")).collect::<String>();
    let expected = "018002000000341202000100000001030004000000646973\
                    6b0400100000000100000000000000ffffffffffffffff05000300000007080906000700000001000100000005\
                    07000f0000000700000001000100000001\
                    00000000";
    assert_eq!(hex(&to_blob(&sample()).data), expected.replace(' ', ""));
}

#[test]
fn round_trip_and_defaults() {
    let blob = to_blob(&sample());
    assert_eq!(from_blob::<Sample>(&blob).unwrap(), sample());
    let empty = StateBlob { kind: "sample".into(), version: 1, data: vec![] };
    assert_eq!(from_blob::<Sample>(&empty).unwrap(), Sample::default());
}

#[test]
fn refusals() {
    let mut blob = to_blob(&sample());
    blob.kind = "other".into();
    assert!(matches!(from_blob::<Sample>(&blob), Err(RestoreError::Kind { .. })));
    blob.kind = "sample".into();
    blob.version = 3;
    assert!(matches!(from_blob::<Sample>(&blob), Err(RestoreError::Version { got: 3, .. })));

    let mut w = FieldWriter::default();
    w.uint(9 | CRITICAL, 1u8);
    let blob = StateBlob { kind: "sample".into(), version: 2, data: w.finish() };
    assert_eq!(from_blob::<Sample>(&blob), Err(RestoreError::UnknownCritical { tag: 9 | CRITICAL }));
    let mut w = FieldWriter::default();
    w.uint(9, 1u8);
    let blob = StateBlob { kind: "sample".into(), version: 2, data: w.finish() };
    assert_eq!(from_blob::<Sample>(&blob), Ok(Sample::default()));
}

proptest! {
    #[test]
    fn hostile_blobs_never_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
        let blob = StateBlob { kind: "sample".into(), version: 1, data };
        let _ = from_blob::<Sample>(&blob);
    }

    #[test]
    fn flipped_and_cut_blobs_never_panic(at in 0usize..80, bit in 0u8..8, cut in 0usize..100) {
        let mut blob = to_blob(&sample());
        if let Some(b) = blob.data.get_mut(at) { *b ^= 1 << bit; }
        blob.data.truncate(cut);
        let _ = from_blob::<Sample>(&blob);
    }
}
