//! One counter of the 8254: modes, count and output derived from the tick at which it was started.
//!
//! The clock between the write of a count and its loading is left out, and a count written in modes 2 and 3
//! starts its period at once.

use saved_state::{FieldWriter, Fields, RestoreError, SavedState};

/// Which bytes of the count an access moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Bytes {
    Low = 1,
    High = 2,
    #[default]
    Both = 3,
}

impl Bytes {
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits & 3 {
            1 => Self::Low,
            2 => Self::High,
            3 => Self::Both,
            _ => return None,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Channel {
    pub mode: u8,
    bytes: Bytes,
    bcd: bool,
    gate: bool,
    /// A count was written since the mode.
    loaded: bool,
    /// Modes 1 and 5: the gate rose since the mode.
    triggered: bool,
    /// Ticks of the full count, 1 to 65536; 0 before one was written.
    reload: u32,
    /// Tick at which the count began.
    start: u64,
    /// Ticks counted when the gate stopped it.
    stopped: Option<u64>,
    /// First byte of two, written.
    write_low: Option<u8>,
    /// The low byte of two was read.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

fn from_bcd(value: u16) -> u32 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(value >> (4 * digit) & 0xF))
}

fn to_bcd(value: u32) -> u16 {
    (0..4).fold(0, |out, digit| out | ((value / 10u32.pow(digit) % 10) as u16) << (4 * digit))
}

impl Channel {
    pub fn reset(gate: bool) -> Self {
        Self {
            mode: 3,
            bytes: Bytes::Both,
            bcd: false,
            gate,
            loaded: false,
            triggered: false,
            reload: 0,
            start: 0,
            stopped: None,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Modes that a rising gate starts.
    fn is_triggered_mode(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }
    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }
    fn is_running(&self) -> bool {
        self.loaded && (!self.is_triggered_mode() || self.triggered)
    }
    fn elapsed(&self, tick: u64) -> u64 {
        self.stopped.unwrap_or(tick.saturating_sub(self.start))
    }
    fn period(&self) -> u64 {
        u64::from(self.reload.max(1))
    }

    /// The output pin.
    pub fn output(&self, tick: u64) -> bool {
        if !self.is_running() {
            return self.mode != 0;
        }
        let (elapsed, period) = (self.elapsed(tick), self.period());
        match self.mode {
            0 | 1 => elapsed >= period,
            _ if self.is_periodic() && self.stopped.is_some() => true,
            2 => elapsed % period != period - 1,
            3 => elapsed % period < period.div_ceil(2),
            _ => elapsed != period,
        }
    }

    /// What a read of the counting element gives.
    fn count(&self, tick: u64) -> u16 {
        let (mut left, period) = (self.period(), self.period());
        if self.is_running() {
            let elapsed = self.elapsed(tick);
            let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
            left = match self.mode {
                2 => period - elapsed % period,
                3 => {
                    let (at, high) = (elapsed % period, period.div_ceil(2));
                    (period & !1).saturating_sub(2 * if at < high { at } else { at - high })
                }
                _ => (period + wrap - elapsed % wrap) % wrap,
            };
        }
        if self.bcd { to_bcd(left as u32) } else { left as u16 }
    }

    /// Rising edges of the output since the count began.
    pub fn edges(&self, tick: u64) -> u64 {
        if !self.is_running() || self.stopped.is_some() {
            return 0;
        }
        let (elapsed, period) = (self.elapsed(tick), self.period());
        match self.mode {
            0 | 1 => u64::from(elapsed >= period),
            2 | 3 => elapsed / period,
            _ => u64::from(elapsed > period),
        }
    }

    /// The tick of the edge after `done` edges.
    pub fn next_edge(&self, done: u64) -> Option<u64> {
        if !self.is_running() || self.stopped.is_some() {
            return None;
        }
        let after = match self.mode {
            2 | 3 => done.saturating_add(1).saturating_mul(self.period()),
            _ if done > 0 => return None,
            0 | 1 => self.period(),
            _ => self.period() + 1,
        };
        Some(self.start.saturating_add(after))
    }

    /// Ticks from one edge to the next.
    pub fn edge_period(&self) -> u64 {
        self.period()
    }

    /// The control word's lower six bits.
    pub fn set_control(&mut self, bytes: Bytes, value: u8) {
        let gate = self.gate;
        *self = Self::reset(gate);
        self.bytes = bytes;
        // 6 and 7 are 2 and 3.
        self.mode = if value & 0b1100 == 0b1100 { value >> 1 & 3 } else { value >> 1 & 7 };
        self.bcd = value & 1 != 0;
    }

    /// A byte of the count. Returns whether the count is complete.
    pub fn write(&mut self, tick: u64, value: u8) -> bool {
        let count = match (self.bytes, self.write_low.take()) {
            (Bytes::Low, _) => u16::from(value),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Bytes::Both, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count.
                    self.loaded = false;
                }
                return false;
            }
        };
        let (count, full) = if self.bcd { (from_bcd(count), 10_000) } else { (u32::from(count), 0x1_0000) };
        self.reload = if count == 0 { full } else { count };
        self.loaded = true;
        if !self.is_triggered_mode() {
            self.start = tick;
            self.stopped = (!self.gate).then_some(0);
        }
        true
    }

    pub fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.count(tick)).to_le_bytes();
        let (value, done) = match self.bytes {
            Bytes::Low => (low, true),
            Bytes::High => (high, true),
            Bytes::Both if self.read_high => (high, true),
            Bytes::Both => (low, false),
        };
        self.read_high = !done;
        if done {
            self.latched_count = None;
        }
        value
    }

    pub fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(tick));
            self.read_high = false;
        }
    }

    pub fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            let out = u8::from(self.output(tick)) << 7;
            let null = u8::from(!self.loaded) << 6;
            self.latched_status =
                Some(out | null | (self.bytes as u8) << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    pub fn gate(&self) -> bool {
        self.gate
    }

    pub fn set_gate(&mut self, tick: u64, gate: bool) {
        let rose = gate && !self.gate;
        let fell = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rose => (self.triggered, self.start) = (true, tick),
            1 | 5 => {}
            _ if fell => self.stopped = Some(self.elapsed(tick)),
            2 | 3 if rose => (self.start, self.stopped) = (tick, None),
            _ if rose => {
                self.start = tick.saturating_sub(self.elapsed(tick));
                self.stopped = None;
            }
            _ => {}
        }
    }
}

impl SavedState for Channel {
    const KIND: &'static str = "pit8254 channel";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        let Self { mode, bytes, bcd, gate, loaded, triggered, reload, start, stopped, .. } = self;
        let Self { write_low, read_high, latched_count, latched_status, .. } = self;
        /// Absent as 0, a value one higher.
        fn plus_one(value: Option<impl Into<u64>>) -> u64 {
            value.map_or(0, |v| v.into().saturating_add(1))
        }
        w.uint(1, *mode).uint(2, *bytes as u8).flag(3, *bcd).flag(4, *gate).flag(5, *loaded);
        w.flag(6, *triggered).uint(7, *reload).uint(8, *start).uint(9, plus_one(*stopped));
        w.uint(10, plus_one(*write_low)).flag(11, *read_high).uint(12, plus_one(*latched_count));
        w.uint(13, plus_one(*latched_status));
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let wrong = |tag, reason| RestoreError::Value { tag, reason };
        let channel = Self {
            mode: r.uint(1)?,
            bytes: Bytes::from_bits(r.uint(2)?).ok_or(wrong(2, "no byte order"))?,
            bcd: r.flag(3)?,
            gate: r.flag(4)?,
            loaded: r.flag(5)?,
            triggered: r.flag(6)?,
            reload: r.uint(7)?,
            start: r.uint(8)?,
            stopped: r.uint::<u64>(9)?.checked_sub(1),
            write_low: small(r.uint(10)?, 10)?,
            read_high: r.flag(11)?,
            latched_count: small(r.uint(12)?, 12)?,
            latched_status: small(r.uint(13)?, 13)?,
        };
        if channel.mode > 5 || channel.reload > 0x1_0000 {
            return Err(wrong(1, "no such mode or count"));
        }
        Ok(channel)
    }
}

/// A value saved one higher.
fn small<T: TryFrom<u64>>(saved: u64, tag: u16) -> Result<Option<T>, RestoreError> {
    let wrong = RestoreError::Value { tag, reason: "number out of range" };
    saved.checked_sub(1).map(|v| T::try_from(v).map_err(|_| wrong)).transpose()
}
