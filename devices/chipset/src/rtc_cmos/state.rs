//! The RTC's saved state.

use super::calendar::DateTime;
use super::{A_UPDATING, CMOS_BYTES, OSCILLATOR, Registers, SECOND_NS, SOURCES, Stopped};
use saved_state::{FieldWriter, Fields, RestoreError, SavedState};

impl SavedState for Registers {
    const KIND: &'static str = "rtc_cmos";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { index, nmi_masked, a, b, c, alarm, ram, offset_seconds, offset_ns, .. } = self;
        let Self { stopped, seen_second, seen_periods, backlog, .. } = self;
        w.uint(1, *index).flag(2, *nmi_masked).uint(3, *a).uint(4, *b).uint(5, *c).bytes(6, alarm);
        w.bytes(7, ram).uint(8, *offset_seconds as u64).uint(9, *offset_ns);
        if let Some(Stopped { time, divider_reset }) = stopped {
            let DateTime { second, minute, hour, day, month, year } = *time;
            let [low, high] = year.to_le_bytes();
            w.bytes(10, &[second, minute, hour, day, month, low, high, u8::from(*divider_reset)]);
        }
        w.uint(11, *seen_second as u64).uint(12, *seen_periods).uint(13, *backlog);
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let registers = Self {
            index: r.uint::<u8>(1)? & 0x7F,
            nmi_masked: r.flag(2)?,
            a: r.uint::<u8>(3)? & !A_UPDATING,
            b: r.uint(4)?,
            c: r.uint::<u8>(5)? & SOURCES,
            alarm: r.array(6)?,
            ram: r.array::<CMOS_BYTES>(7)?,
            offset_seconds: r.uint::<u64>(8)? as i64,
            offset_ns: r.uint(9)?,
            stopped: match r.optional_bytes(10, 8)? {
                Some(&[second, minute, hour, day, month, low, high, divider_reset]) => {
                    let year = u16::from_le_bytes([low, high]).min(9999);
                    let time = DateTime { second, minute, hour, day, month, year };
                    Some(Stopped { time, divider_reset: divider_reset != 0 })
                }
                Some(other) => return Err(RestoreError::Length { tag: 10, got: other.len(), expected: 8 }),
                None => None,
            },
            seen_second: r.uint::<u64>(11)? as i64,
            seen_periods: r.uint(12)?,
            backlog: r.uint::<u64>(13)?.min(u64::from(OSCILLATOR.0)),
        };
        // Four digits of years, and then some: sums with it cannot overflow.
        if registers.offset_seconds.unsigned_abs() > 1 << 40 || registers.seen_second.unsigned_abs() > 1 << 41
        {
            return Err(RestoreError::Value { tag: 8, reason: "further than the calendar reaches" });
        }
        if u64::from(registers.offset_ns) >= SECOND_NS {
            return Err(RestoreError::Value { tag: 9, reason: "a second or more" });
        }
        Ok(registers)
    }
}
