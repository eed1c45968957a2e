//! The spec in the saved-state format: numbered fields, absent is default.
//!
//! Called by `machine` and `migration`. A decoded spec is shape only: `vmm` calls
//! [`MachineSpec::validate`] before it builds anything from it. Tags never change their meaning;
//! `encode` destructures exhaustively, so that a new field fails to compile until it is saved.

use crate::identity::{Mac, Uuid};
use crate::spec::{
    BlkSpec, BootSpec, ClockRate, ClockSpec, ConsoleSpec, CpuFeature, CpuSpec, DeviceSpec, HostKey,
    MachineSpec, MissedTicks, NetSpec, PciSlot, RamBacking, RamSpec, RngSpec, UartSpec,
};
use crate::validate::limit;
use alloc::string::String;
use saved_state::{CRITICAL, FieldWriter, Fields, RestoreError, SavedState};

type Decoded<T> = Result<T, RestoreError>;

fn required<T>(value: Option<T>, name: &'static str) -> Decoded<T> {
    value.ok_or(RestoreError::Missing(name))
}

impl SavedState for MachineSpec {
    const KIND: &'static str = "machine_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { name, uuid, cpus, ram, boot, clock, devices } = self;
        w.text(1, name).bytes(2, &uuid.0).nested(3, cpus).nested(4, ram).nested(5, boot).nested(6, clock);
        w.list(7, devices);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            name: r.text(1, limit::NAME)?,
            uuid: Uuid(r.array(2)?),
            cpus: required(r.nested(3)?, "the processors of the spec")?,
            ram: required(r.nested(4)?, "the memory of the spec")?,
            boot: required(r.nested(5)?, "the boot of the spec")?,
            clock: required(r.nested(6)?, "the clock of the spec")?,
            devices: r.list(7, limit::DEVICES)?,
        })
    }
}

impl SavedState for CpuSpec {
    const KIND: &'static str = "cpu_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { count, max, model, features, address_bits } = self;
        w.uint(1, *count).uint(2, *max).text(3, model).list(4, features).uint(5, *address_bits);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            count: r.uint(1)?,
            max: r.uint(2)?,
            model: r.text(3, limit::CPU_NAME)?,
            features: r.list(4, limit::CPU_FEATURES)?,
            address_bits: r.uint(5)?,
        })
    }
}

impl SavedState for CpuFeature {
    const KIND: &'static str = "cpu_feature";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { name, enabled } = self;
        w.text(1, name).flag(2, *enabled);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self { name: r.text(1, limit::CPU_NAME)?, enabled: r.flag(2)? })
    }
}

impl SavedState for RamSpec {
    const KIND: &'static str = "ram_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { bytes, hotplug_bytes, backing } = self;
        let (backing, page_bytes) = match backing {
            RamBacking::Memfd => (0u8, 0),
            RamBacking::Anonymous => (1, 0),
            RamBacking::Huge { page_bytes } => (2, *page_bytes),
        };
        w.uint(1, *bytes).uint(2, *hotplug_bytes).uint(3, backing).uint(4, page_bytes);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        let (bytes, hotplug_bytes) = (r.uint(1)?, r.uint(2)?);
        let (backing, page_bytes) = (r.uint::<u8>(3)?, r.uint(4)?);
        let backing = match backing {
            0 => RamBacking::Memfd,
            1 => RamBacking::Anonymous,
            2 => RamBacking::Huge { page_bytes },
            _ => return Err(RestoreError::Value { tag: 3, reason: "unknown backing of memory" }),
        };
        Ok(Self { bytes, hotplug_bytes, backing })
    }
}

impl SavedState for BootSpec {
    const KIND: &'static str = "boot_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { kernel, initrd, command_line } = self;
        w.text(1, &kernel.0);
        put_key(w, 2, initrd.as_ref());
        w.text(3, command_line);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            kernel: HostKey(r.text(1, limit::KEY)?),
            initrd: optional_key(r, 2)?,
            command_line: r.text(3, limit::COMMAND_LINE)?,
        })
    }
}

impl SavedState for ClockSpec {
    const KIND: &'static str = "clock_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { tsc_khz, rate: ClockRate { numerator, denominator }, missed_ticks } = self;
        let policy = match missed_ticks {
            MissedTicks::Discard => 0u8,
            MissedTicks::Reinject => 1,
        };
        w.uint(1, *tsc_khz).uint(2, *numerator).uint(3, *denominator).uint(4, policy);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            tsc_khz: r.uint(1)?,
            rate: ClockRate { numerator: r.uint(2)?, denominator: r.uint(3)? },
            missed_ticks: match r.uint::<u8>(4)? {
                0 => MissedTicks::Discard,
                1 => MissedTicks::Reinject,
                _ => return Err(RestoreError::Value { tag: 4, reason: "unknown policy for missed ticks" }),
            },
        })
    }
}

/// Which variant a device is; the number is critical, because another one means another machine.
const DEVICE_KIND: u16 = CRITICAL | 1;
const DEVICE_BODY: u16 = CRITICAL | 2;

impl SavedState for DeviceSpec {
    const KIND: &'static str = "device_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        match self {
            Self::Uart(spec) => w.uint(DEVICE_KIND, 1u8).nested(DEVICE_BODY, spec),
            Self::Blk(spec) => w.uint(DEVICE_KIND, 2u8).nested(DEVICE_BODY, spec),
            Self::Net(spec) => w.uint(DEVICE_KIND, 3u8).nested(DEVICE_BODY, spec),
            Self::Console(spec) => w.uint(DEVICE_KIND, 4u8).nested(DEVICE_BODY, spec),
            Self::Rng(spec) => w.uint(DEVICE_KIND, 5u8).nested(DEVICE_BODY, spec),
        };
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        const WHAT: &str = "a device of the spec";
        Ok(match r.uint::<u16>(DEVICE_KIND)? {
            1 => Self::Uart(required(r.nested(DEVICE_BODY)?, WHAT)?),
            2 => Self::Blk(required(r.nested(DEVICE_BODY)?, WHAT)?),
            3 => Self::Net(required(r.nested(DEVICE_BODY)?, WHAT)?),
            4 => Self::Console(required(r.nested(DEVICE_BODY)?, WHAT)?),
            5 => Self::Rng(required(r.nested(DEVICE_BODY)?, WHAT)?),
            _ => return Err(RestoreError::Value { tag: DEVICE_KIND, reason: "unknown kind of device" }),
        })
    }
}

impl SavedState for UartSpec {
    const KIND: &'static str = "uart_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { port, stream } = self;
        w.uint(1, *port);
        put_key(w, 2, stream.as_ref());
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self { port: r.uint(1)?, stream: optional_key(r, 2)? })
    }
}

impl SavedState for BlkSpec {
    const KIND: &'static str = "blk_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, disk, read_only, serial, discard, slot } = self;
        w.text(1, id).text(2, &disk.0).flag(3, *read_only).text(4, serial).flag(5, *discard);
        put_slot(w, 6, *slot);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            id: r.text(1, limit::ID)?,
            disk: HostKey(r.text(2, limit::KEY)?),
            read_only: r.flag(3)?,
            serial: r.text(4, limit::SERIAL)?,
            discard: r.flag(5)?,
            slot: optional_slot(r, 6)?,
        })
    }
}

impl SavedState for NetSpec {
    const KIND: &'static str = "net_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, mac, backend, slot } = self;
        w.text(1, id).bytes(2, &mac.0).text(3, &backend.0);
        put_slot(w, 4, *slot);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self {
            id: r.text(1, limit::ID)?,
            mac: Mac(r.array(2)?),
            backend: HostKey(r.text(3, limit::KEY)?),
            slot: optional_slot(r, 4)?,
        })
    }
}

impl SavedState for ConsoleSpec {
    const KIND: &'static str = "console_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, stream, slot } = self;
        w.text(1, id);
        put_key(w, 2, stream.as_ref());
        put_slot(w, 3, *slot);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self { id: r.text(1, limit::ID)?, stream: optional_key(r, 2)?, slot: optional_slot(r, 3)? })
    }
}

impl SavedState for RngSpec {
    const KIND: &'static str = "rng_spec";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { id, slot } = self;
        w.text(1, id);
        put_slot(w, 2, *slot);
    }

    fn decode(r: &mut Fields<'_>) -> Decoded<Self> {
        Ok(Self { id: r.text(1, limit::ID)?, slot: optional_slot(r, 2)? })
    }
}

/// A key is never empty, so that absent means none.
fn put_key(w: &mut FieldWriter, tag: u16, key: Option<&HostKey>) {
    w.text(tag, key.map_or("", |key| key.0.as_str()));
}

fn optional_key(r: &mut Fields<'_>, tag: u16) -> Decoded<Option<HostKey>> {
    let text: String = r.text(tag, limit::KEY)?;
    Ok((!text.is_empty()).then_some(HostKey(text)))
}

fn put_slot(w: &mut FieldWriter, tag: u16, slot: Option<PciSlot>) {
    if let Some(PciSlot { bus, device, function }) = slot {
        w.bytes(tag, &[bus, device, function]);
    }
}

fn optional_slot(r: &mut Fields<'_>, tag: u16) -> Decoded<Option<PciSlot>> {
    match r.optional_bytes(tag, 3)? {
        None => Ok(None),
        Some(&[bus, device, function]) => Ok(Some(PciSlot { bus, device, function })),
        Some(other) => Err(RestoreError::Length { tag, got: other.len(), expected: 3 }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use saved_state::{StateBlob, from_blob, to_blob};

    /// A spec that uses every kind of device and every optional field.
    pub(crate) fn full_spec() -> MachineSpec {
        let key = |name: &str| HostKey(name.into());
        MachineSpec {
            name: "trial-1".into(),
            uuid: Uuid([0x6B; 16]),
            cpus: CpuSpec {
                count: 2,
                max: 4,
                features: vec![CpuFeature { name: "sha".into(), enabled: true }],
                ..CpuSpec::default()
            },
            ram: RamSpec {
                bytes: 1 << 30,
                hotplug_bytes: 2 << 30,
                backing: RamBacking::Huge { page_bytes: 2 << 20 },
            },
            boot: BootSpec {
                kernel: key("kernel"),
                initrd: Some(key("initrd")),
                command_line: "console=ttyS0".into(),
            },
            clock: ClockSpec {
                tsc_khz: 2_000_000,
                rate: ClockRate { numerator: 1, denominator: 2 },
                missed_ticks: MissedTicks::Reinject,
            },
            devices: vec![
                DeviceSpec::Uart(UartSpec { port: 0, stream: Some(key("stdio")) }),
                DeviceSpec::Blk(BlkSpec {
                    id: "disk0".into(),
                    disk: key("disk0"),
                    read_only: true,
                    serial: "S-1".into(),
                    discard: true,
                    slot: None,
                }),
                DeviceSpec::Net(NetSpec {
                    id: "nic0".into(),
                    mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
                    backend: key("user"),
                    slot: Some(PciSlot { bus: 0, device: 7, function: 0 }),
                }),
                DeviceSpec::Console(ConsoleSpec { id: "hvc0".into(), stream: None, slot: None }),
                DeviceSpec::Rng(RngSpec { id: "rng0".into(), slot: None }),
            ],
        }
    }

    #[test]
    fn a_spec_comes_back_as_it_was() {
        let spec = full_spec();
        assert_eq!(from_blob::<MachineSpec>(&to_blob(&spec)), Ok(spec));
    }

    /// Version 1 as released: these bytes must be read for ever.
    #[test]
    fn golden_bytes_of_version_1() {
        let hex: String =
            to_blob(&full_spec()).data.iter().map(|byte| alloc::format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN_V1);
    }

    const GOLDEN_V1: &str = "010007000000747269616c2d310200100000006b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b03003e00000001000100000002\
         020001000000040300090000007838362d36342d76330400140000001000000001000300000073686102000100000001\
         0500010000002e0400240000000100040000000000004002000400000000000080030001000000020400030000000000\
         2005002b0000000100060000006b65726e656c020006000000696e6974726403000d000000636f6e736f6c653d747479\
         533006001e00000001000300000080841e0200010000000103000100000002040001000000010700ca00000018000000\
         0180010000000102800b000000020005000000737464696f3a0000000180010000000202802d00000001000500000064\
         69736b300200050000006469736b3003000100000001040003000000532d310500010000000136000000018001000000\
         030280290000000100040000006e69633002000600000052540001020303000400000075736572040003000000000700\
         170000000180010000000402800a00000001000400000068766330170000000180010000000502800a00000001000400\
         0000726e6730";

    #[test]
    fn an_unknown_device_is_refused() {
        let mut w = FieldWriter::default();
        w.uint(DEVICE_KIND, 99u8).bytes(DEVICE_BODY, &[]);
        let blob = StateBlob { kind: "device_spec".into(), version: 1, data: w.finish() };
        assert!(matches!(from_blob::<DeviceSpec>(&blob), Err(RestoreError::Value { .. })));
    }

    proptest! {
        #[test]
        fn damaged_specs_never_panic(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
            whole in any::<bool>(),
        ) {
            let mut blob = to_blob(&full_spec());
            for (at, value) in edits {
                let at = at.index(blob.data.len());
                blob.data[at] = value;
            }
            if !whole {
                blob.data.truncate(cut.index(blob.data.len()));
            }
            if let Ok(spec) = from_blob::<MachineSpec>(&blob) {
                let _ = spec.validate();
                let again: Vec<u8> = to_blob(&spec).data;
                prop_assert!(again.len() <= saved_state::MAX_BLOB_BYTES);
            }
        }
    }
}
